"""Sources cut into pieces read as the whole does, whatever the format and wherever the cuts fall."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from llamahome.config import Config
from llamahome.data import units
from llamahome.data.formats import find_files, read_source
from llamahome.data.units import cut
from llamahome.errors import DataError


@pytest.fixture
def goal(monkeypatch):
    def choose(size: int) -> None:
        monkeypatch.setattr(units, "MIN_UNIT_BYTES", size)
        monkeypatch.setattr(units, "MIN_PART_UNIT_BYTES", size)
        monkeypatch.setattr(units, "_UNITS", 1 << 40)

    return choose


def settings(**values):
    return Config.load(None, {f"data.{key}": value for key, value in values.items()}).data


def shown(rows) -> list[str]:
    return [str(row) if isinstance(row, DataError) else repr(row) for row in rows]


def words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choice(["sea", "Straße", "東京", "a", "mill"]) for _ in range(count))


def jsonl(chance: random.Random) -> bytes:
    lines = [f'{{"text": "{words(chance, chance.randrange(1, 30))}"}}'.encode() for _ in range(200)]
    lines[20], lines[70], lines[150] = b"{broken", b"\xff\xfe bad", b'{"text": "' + b"x" * 3000 + b'"}'
    return b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n" * chance.randrange(3)


def paragraphs(chance: random.Random) -> bytes:
    blocks = ["\n".join(words(chance, 5) for _ in range(chance.randrange(1, 6))) for _ in range(100)]
    return "".join(block + "\n" + chance.choice(["\n", " \t\n", "\n\n\u3000\n"]) for block in blocks).encode()


def table(chance: random.Random) -> bytes:
    cells = ['"a ""quoted""\n\nline, and more"', "plain", '5" nail', "x" * 40]
    rows = [f"{chance.choice(cells)},{words(chance, 4)}" for _ in range(200)]
    rows[50], rows[90] = "only one", '"closed" wrongly,x'
    return ("prompt,completion\n" + "\n".join(rows) + '\n"never closed,1\n').encode()


CASES = {
    "a.jsonl": jsonl,
    "a.json": lambda chance: jsonl(chance).replace(b"\xef\xbb\xbf", b""),
    "a.jsonl.gz": lambda chance: gzip.compress(jsonl(chance)),
    "a.txt": paragraphs,
    "a.csv": table,
    "a.tsv": lambda chance: table(chance).replace(b",", b"\t"),
    "b.csv.gz": lambda chance: gzip.compress(table(chance)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 100, 1000, 7000])
def test_pieces_read_as_the_whole_does(tmp_path, goal, name, size):
    chance = random.Random(size)
    (tmp_path / name).write_bytes(CASES[name](chance))
    goal(size)
    chosen = settings(max_row_bytes=2000)
    [source] = find_files(tmp_path / name, chosen)
    found = cut([source], chosen, 1, 0)
    pieces = [piece for unit in found for _, piece in unit.pieces]
    assert len(pieces) > (2 if size <= 1000 else 0)
    rows = [row for piece in pieces for row in shown(read_source(source, chosen, piece))]
    assert rows == shown(read_source(source, chosen))
    assert all(unit.size <= size + 20_000 for unit in found)


def test_lines_as_samples(tmp_path, goal):
    goal(500)
    path = tmp_path / "a.txt"
    path.write_bytes(paragraphs(random.Random(0)))
    chosen = settings(format="lines")
    [source] = find_files(path, chosen)
    pieces = [piece for unit in cut([source], chosen, 1, 0) for _, piece in unit.pieces]
    assert len(pieces) > 5
    rows = [row for piece in pieces for row in shown(read_source(source, chosen, piece))]
    assert rows == shown(read_source(source, chosen))


def test_row_groups_of_parquet(tmp_path, goal):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [f"row {i}" for i in range(1000)]}), tmp_path / "a.parquet", row_group_size=90)
    goal(500)
    [source] = find_files(tmp_path / "a.parquet", settings())
    pieces = [piece for unit in cut([source], settings(), 1, 0) for _, piece in unit.pieces]
    assert len(pieces) > 3
    rows = [row for piece in pieces for row in shown(read_source(source, settings(), piece))]
    assert rows == shown(read_source(source, settings()))


def test_small_files_share_units_and_evaluation_data_does_not(tmp_path, goal):
    for number in range(30):
        (tmp_path / f"{number:02}.jsonl").write_text('{"text": "hello"}\n' * 10)  # 180 bytes
    goal(1000)
    sources = find_files(tmp_path, settings())
    found = cut(sources, settings(), 1, held_out=4)
    assert [len(unit.pieces) for unit in found] == [6, 6, 6, 6, 2, 4]
    assert [unit.held_out for unit in found] == [False] * 5 + [True]
    assert [i for unit in found for i, _ in unit.pieces] == list(range(30))


def test_json_documents_and_plugins_stay_whole(tmp_path, goal):
    goal(10)
    (tmp_path / "a.json").write_text('[{"text": "one"},\n {"text": "two"}]')
    [source] = find_files(tmp_path / "a.json", settings())
    [unit] = cut([source], settings(), 1, 0)
    assert [piece.end for _, piece in unit.pieces] == [None]


def test_damaged_files_are_left_to_their_readers(tmp_path, goal):
    goal(10)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(random.Random(0)))[:-20])
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"x" * 100)
    for name in ("a.jsonl.gz", "a.parquet"):
        [source] = find_files(tmp_path / name, settings())
        [unit] = cut([source], settings(), 1, 0)
        with pytest.raises(DataError, match="damaged after"):
            list(read_source(source, settings(on_bad_row="skip"), unit.pieces[0][1]))


def test_units_grow_with_the_data(tmp_path):
    path = Path(tmp_path / "a.jsonl")
    with path.open("wb") as file:
        file.truncate(100 << 20)
    [source] = find_files(path, settings())
    assert len(cut([source], settings(), 1, 0)) == 1  # no line end: one line
    path.write_bytes((b'{"text": "' + b"x" * 1000 + b'"}\n') * 70_000)
    [source] = find_files(path, settings())
    assert [round(unit.size / 2**20) for unit in cut([source], settings(), 1, 0)] == [32, 32, 4]
    assert len(cut([source], settings(), 20, 0)) >= 60
