"""Prepared folders: gone on with after a kill, shared among machines, opened as one, refused where they do not fit."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llamahome.config import Config
from llamahome.data import journal, units
from llamahome.data.hashes import HashWriter, count_repeated, count_shared
from llamahome.data.prepare import check, prepare, prepare_folder
from llamahome.data.prepared import verify_folder
from llamahome.data.report import DataReport, unpack_place
from llamahome.data.schemas import Sample
from llamahome.errors import DataError, StorageError

KILLER = Path(__file__).parents[1] / "faults" / "kill_prepare.py"


def config(**values) -> Config:
    return Config.load(None, {key.replace("__", "."): value for key, value in values.items()})


def write(path: Path, numbers) -> Path:
    rows = [{"prompt": f"What is {i}?", "completion": "It is" + " two" * (i % 7 + 1)} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", range(300))


@pytest.fixture
def small_units(monkeypatch):
    for name in ("MIN_UNIT_BYTES", "MIN_PART_UNIT_BYTES"):
        monkeypatch.setattr(units, name, 3000)
    monkeypatch.setattr(units, "_UNITS", 1 << 40)


def documents(store) -> list[tuple[bytes, bytes]]:
    if store is None:
        return []
    return [tuple(part.tobytes() for part in store.document(i)) for i in range(len(store))]


def places(prepared) -> list[str]:
    return [prepared.report.place(unpack_place(prepared.train.source(i))) for i in range(len(prepared.train))]


def by_place(prepared) -> dict[str, tuple[bytes, bytes]]:
    return dict(zip(places(prepared), documents(prepared.train), strict=True))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Going on


def run_killer(tmp_path, tiny_tokenizer, data, kills: int) -> str:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = data.read_text().splitlines(keepends=True)
    rows[70] = "{broken\n"
    data.write_text("".join(rows))
    (tmp_path / "eval.jsonl").write_text("".join(rows[:40]))
    command = [sys.executable, KILLER, tmp_path / "tokenizer", data, tmp_path / "out", str(kills), "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kills_lose_nothing_and_change_nothing(data, tiny_tokenizer, tmp_path):
    assert "same bytes" in run_killer(tmp_path, tiny_tokenizer, data, 20)


@pytest.mark.slow
def test_a_hundred_kills(data, tiny_tokenizer, tmp_path):
    assert "same bytes" in run_killer(tmp_path, tiny_tokenizer, data, 100)


def stop_after(monkeypatch, count: int) -> list[int]:
    """Make a preparation fail after some units; the numbers of the units that were begun."""
    begun: list[int] = []
    work = journal._Filling._prepare

    def limited(self, number, *rest):
        begun.append(number)
        if len(begun) > count:
            raise KeyboardInterrupt
        return work(self, number, *rest)

    monkeypatch.setattr(journal._Filling, "_prepare", limited)
    return begun


def test_finished_units_are_not_done_again(data, tiny_tokenizer, tmp_path, small_units, monkeypatch):
    report = prepare_folder(data, tiny_tokenizer, tmp_path / "calm")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(data, tiny_tokenizer, tmp_path / "out")
    with pytest.raises(DataError, match="not finished"):
        prepare(tmp_path / "out", tiny_tokenizer)
    begun = stop_after(monkeypatch, 1000)
    shown = []
    assert prepare_folder(data, tiny_tokenizer, tmp_path / "out", show=lambda p: shown.append(p.share)) == report
    assert begun[0] == 3
    assert shown == sorted(shown)
    assert shown[-1] == 1.0
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


def test_a_finished_folder_is_left_alone(data, tiny_tokenizer, tmp_path, monkeypatch):
    prepare_folder(data, tiny_tokenizer, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    begun = stop_after(monkeypatch, 0)
    prepare_folder(data, tiny_tokenizer, tmp_path / "out")
    assert begun == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("finished", [False, True])
def test_another_preparation_is_not_overwritten(data, tiny_tokenizer, tmp_path, small_units, monkeypatch, finished):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 1000 if finished else 3)
        try:
            prepare_folder(data, tiny_tokenizer, out)
        except KeyboardInterrupt:
            assert not finished
    before = tree(out)
    with pytest.raises(DataError, match=r"another preparation, with data.max_length 512, not 64"):
        prepare_folder(data, tiny_tokenizer, out, config=config(data__max_length=64))
    with pytest.raises(DataError, match="another preparation, with part 1 of 1"):
        prepare_folder(data, tiny_tokenizer, out, part=(1, 2))
    write(data, range(1, 301))
    with pytest.raises(DataError, match="another preparation, with other data"):
        prepare_folder(data, tiny_tokenizer, out)
    assert tree(out) == before


def test_the_same_data_may_move_while_it_is_prepared(data, tiny_tokenizer, tmp_path, small_units, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(data, tiny_tokenizer, tmp_path / "out")
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(data.read_bytes())
    begun = stop_after(monkeypatch, 1000)
    prepare_folder(moved, tiny_tokenizer, tmp_path / "out")
    assert begun[0] == 3


def test_other_files_are_not_overwritten(data, tiny_tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(StorageError, match="there is something already"):
        prepare_folder(data, tiny_tokenizer, tmp_path / "out")


def test_two_processes_do_not_share_a_folder(data, tiny_tokenizer, tmp_path):
    with journal._alone(tmp_path / "out"), pytest.raises(StorageError, match="another process"):
        prepare_folder(data, tiny_tokenizer, tmp_path / "out")


def test_bad_rows_are_counted_over_all_units(data, tiny_tokenizer, tmp_path, small_units):
    data.write_text(data.read_text().replace('"What is 3', "What is 3"))  # 3, 30 to 39
    skip = config(data__on_bad_row="skip", data__max_bad_rows=11)
    assert prepare_folder(data, tiny_tokenizer, tmp_path / "out", config=skip).bad_rows.count == 11
    with pytest.raises(DataError, match="more than 10 bad rows"):
        prepare_folder(
            data, tiny_tokenizer, tmp_path / "no", config=config(data__on_bad_row="skip", data__max_bad_rows=10)
        )


def test_the_first_row_decides_about_the_schema_of_all_pieces(tiny_tokenizer, tmp_path, small_units):
    rows = [{"text": f"sample {i}", "prompt": "What?", "completion": "That."} for i in range(100)]
    rows[0] = {"text": "the first"}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in (1, 2):
        assert prepare_folder(path, tiny_tokenizer, tmp_path / f"out{i}", part=(i, 2)).schemas == {0: "text"}


# Parts


@pytest.fixture
def parts(data, tiny_tokenizer, tmp_path, small_units):
    for i in range(1, 4):
        prepare_folder(data, tiny_tokenizer, tmp_path / "parts" / f"part-{i}", part=(i, 3))
    return tmp_path / "parts"


def test_parts_are_disjoint_and_complete(parts, data, tiny_tokenizer, tmp_path):
    whole = prepare(data, tiny_tokenizer, output=tmp_path / "whole")
    for name in ("train", "validation"):
        found = [documents(getattr(prepare(parts / f"part-{i}", tiny_tokenizer), name)) for i in range(1, 4)]
        together = sorted(document for part in found for document in part)
        assert together == sorted(documents(getattr(whole, name)))
        assert len(set(together)) == len(together) > 0
    sizes = [prepare(parts / f"part-{i}", tiny_tokenizer).train.num_tokens for i in range(1, 4)]
    assert min(sizes) > 0.6 * max(sizes)


@pytest.mark.parametrize("how", ["glob", "list", "parent"])
def test_parts_open_as_one(parts, data, tiny_tokenizer, tmp_path, how, caplog):
    whole = prepare(data, tiny_tokenizer, output=tmp_path / "whole")
    paths = {"glob": str(parts / "part-*"), "list": sorted(parts.iterdir()), "parent": parts}
    with prepare(paths[how], tiny_tokenizer) as joined:
        assert sorted(documents(joined.train)) == sorted(documents(whole.train))
        assert by_place(joined) == by_place(whole)
        assert joined.report.train == whole.report.train
        assert (joined.report.rows, joined.report.lengths) == (whole.report.rows, whole.report.lengths)
        again = pickle.loads(pickle.dumps(joined.train))
        assert documents(again) == documents(joined.train)
        assert again.fingerprint == joined.train.fingerprint
        assert len(np.unique(joined.train.lengths())) > 1
    assert "missing" not in caplog.text


def test_missing_and_repeated_parts_are_named(parts, tiny_tokenizer, caplog):
    prepare([parts / "part-1", parts / "part-3"], tiny_tokenizer)
    assert "of the 3 parts of the data these are missing: 2" in caplog.text
    with pytest.raises(DataError, match="part 1 of 3 of the same data is there twice"):
        prepare([parts / "part-1", parts / "part-1"], tiny_tokenizer)


def test_folders_of_other_data_join_too(data, tiny_tokenizer, tmp_path):
    other = write(tmp_path / "other.jsonl", range(1000, 1020))
    folders = []
    for path in (data, other):
        folders.append(tmp_path / path.stem)
        prepare_folder(path, tiny_tokenizer, folders[-1], config=config(data__validation_split=0.0))
    joined = prepare(folders, tiny_tokenizer, config=config(data__validation_split=0.0))
    assert len(joined.train) == 320
    assert places(joined)[299:301] == [f"{data}:300", f"{other}:1"]
    assert joined.report.files == [str(data), str(other)]


def test_a_part_may_be_empty(data, tiny_tokenizer, tmp_path):
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:3]))
    for i in (1, 2):
        report = prepare_folder(data, tiny_tokenizer, tmp_path / f"part-{i}", part=(i, 2))
    assert report.train.samples == 0
    assert verify_folder(tmp_path / "part-2")[0] == 0
    assert len(prepare(str(tmp_path / "part-*"), tiny_tokenizer).train) == 3
    with pytest.raises(DataError, match="no training sample"):
        prepare(tmp_path / "part-2", tiny_tokenizer)


# Used for training


def test_a_prepared_folder_is_used_without_tokenising(data, tiny_tokenizer, tmp_path, monkeypatch):
    expected = prepare(data, tiny_tokenizer)
    prepare_folder(data, tiny_tokenizer, tmp_path / "out")
    monkeypatch.setattr(journal._Filling, "_prepare", lambda *_: pytest.fail("tokenised"))
    found = prepare(tmp_path / "out", tiny_tokenizer)
    assert found.train.fingerprint == expected.train.fingerprint
    assert documents(found.validation) == documents(expected.validation)


def test_what_does_not_fit_is_named(data, tiny_tokenizer, tmp_path):
    prepare_folder(data, tiny_tokenizer, tmp_path / "out")
    other_tokens, other_template = copy.deepcopy(tiny_tokenizer), copy.deepcopy(tiny_tokenizer)
    other_tokens.add_tokens(["What"])
    other_template.chat_template = "{{ '\n' }}" + tiny_tokenizer.chat_template
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        prepare(tmp_path / "out", other_tokens)
    with pytest.raises(DataError, match="prepared with another chat template"):
        prepare(tmp_path / "out", other_template)
    for name, value in {"max_length": 64, "overflow": "drop", "train_on": "all", "validation_split": 0.2}.items():
        with pytest.raises(DataError, match=rf"prepared with data.{name} \S+, not {value}") as error:
            prepare(tmp_path / "out", tiny_tokenizer, config=config(**{f"data__{name}": value}))
        assert f"set data.{name} to" in error.value.fix
        assert error.value.where == str(tmp_path / "out")
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        prepare(tmp_path / "out", tiny_tokenizer, vocab_size=100)
    with pytest.raises(DataError, match="prepared folders and data files at once"):
        prepare([tmp_path / "out", data], tiny_tokenizer)
    with pytest.raises(DataError, match="prepared already"):
        check(tmp_path / "out", tiny_tokenizer)


def test_other_evaluation_data_replaces_what_was_held_out(data, tiny_tokenizer, tmp_path):
    prepare_folder(data, tiny_tokenizer, tmp_path / "out")
    other = write(tmp_path / "other.jsonl", range(1000, 1020))
    with prepare(tmp_path / "out", tiny_tokenizer, eval_data=other) as prepared:
        assert prepared.validation is not None
        assert len(prepared.validation) == prepared.report.validation.samples == 20


def test_evaluation_data_is_prepared_along(data, tiny_tokenizer, tmp_path, small_units):
    other = write(tmp_path / "other.jsonl", [*range(280, 330), 280])
    report = prepare_folder(data, tiny_tokenizer, tmp_path / "out", eval_data=other)
    assert (report.train.samples, report.validation.samples, report.leaked) == (300, 51, 21)
    prepare(tmp_path / "out", tiny_tokenizer, config=config(data__validation_split=0.3))  # there is no split to differ


# Damage


def test_every_flipped_bit_is_found(data, tiny_tokenizer, tmp_path, small_units):
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:40]))
    out = tmp_path / "out"
    prepare_folder(data, tiny_tokenizer, out)
    assert verify_folder(out)[0] == 40
    chance = np.random.default_rng(0)
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for at in chance.choice(len(content), min(len(content), 60), replace=False):
            broken = bytearray(content)
            broken[at] ^= 1 << chance.integers(8)
            path.write_bytes(broken)
            with pytest.raises(DataError) as error:
                verify_folder(out)
            assert str(path) in error.value.where
            if path.suffix == ".tokens":
                assert "byte " in error.value.where
        path.write_bytes(content)
    verify_folder(out)


# Duplicates in bounded memory


@pytest.mark.parametrize("per_pass", [7, 100, 1 << 23])
def test_duplicates_are_counted_in_passes(tmp_path, monkeypatch, per_pass):
    monkeypatch.setattr("llamahome.data.hashes.PASS_HASHES", per_pass)
    monkeypatch.setattr("llamahome.data.hashes._BLOCK", 64)
    chance = np.random.default_rng(0)
    texts = [[f"text {i}" for i in chance.integers(0, 300, 400)] for _ in range(3)]
    files = []
    for number, names in enumerate(texts):
        files.append(tmp_path / str(number))
        with files[-1].open("wb") as file:
            writer = HashWriter(file)
            for name in names:
                writer.add(Sample("f", 1, "text", text=name))
            writer.flush()
    known = set(texts[0] + texts[1])
    assert count_repeated(files[:2]) == 800 - len(known)
    assert count_shared(files[2:], files[:2]) == sum(name in known for name in texts[2])
    assert count_shared([], files) == count_repeated([]) == 0


def test_reports_add_up():
    one, two = DataReport(["a"]), DataReport(["b", "a"])
    one.rows, two.rows = 1, 2
    one.bad_rows.add((0, 5))
    for line in range(9):
        two.bad_rows.add((0, line))
    two.longest = 7, (1, 3)
    one.merge(two, [1, 0])
    one.files.append("b")
    assert (one.rows, one.bad_rows.count) == (3, 10)
    assert [one.place(place) for place in one.bad_rows.examples] == ["a:5", "b:0", "b:1", "b:2", "b:3"]
    assert (one.longest[0], one.place(one.longest[1])) == (7, "a:3")


# Memory

MEASURE = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from llamahome.config import Config
from llamahome.data.prepare import prepare_folder
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prepare_folder(sys.argv[2], tokenizer, sys.argv[3], config=Config())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    peaks = []
    for megabytes in (16, 160):
        path = tmp_path / f"{megabytes}.jsonl"
        with path.open("w") as file:
            for i in range(megabytes << 5):
                file.write(json.dumps({"text": f"{i} " + "It was raining when she left the mill; " * 800}) + "\n")
        command = [sys.executable, "-c", MEASURE, tmp_path / "tokenizer", path, tmp_path / f"out-{megabytes}"]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] < 1000
    assert peaks[1] < peaks[0] + 100
