"""Every format is read as written, and every fault is told with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamahome.config import Config, DataSettings
from llamahome.data import formats, sources
from llamahome.data.formats import find_files, read_rows, read_source
from llamahome.data.rows import Row
from llamahome.errors import DataError


def settings(**values) -> DataSettings:
    return Config.load(None, {f"data.{name}": value for name, value in values.items()}).data


def raises(error: DataError):
    raise error


def rows(*paths: Path, **values) -> list[Row]:
    chosen = settings(**values)
    return list(read_rows(find_files(list(paths), chosen), chosen, raises))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(found: list[Row]) -> list[object]:
    return [row.fields["text"] for row in found]


# Files that are read, and the (line, text) pairs in them.
GOOD = {
    "crlf.jsonl": (b'{"text": "a"}\r\n{"text": "b"}\r\n', [(1, "a"), (2, "b")]),
    "bom.jsonl": (b'\xef\xbb\xbf{"text": "a"}\n', [(1, "a")]),
    "blank.jsonl": (b'\n{"text": "a"}\n  \n\n{"text": "b"}', [(2, "a"), (5, "b")]),
    "separator.jsonl": ('{"text": "a\u2028b\u2029\x85c"}\n{"text": "d"}\n', [(1, "a\u2028b\u2029\x85c"), (2, "d")]),
    "array_in.jsonl": (b'[\n{"text": "a"},\n\n{"text": "b"}]', [(2, "a"), (4, "b")]),
    "array.json": (b' [{"text": "a"},\n {"text": "b"}\n]\n', [(1, "a"), (2, "b")]),
    "empty_array_beside.json": (
        b'{"v": "data", "data": [{"text": "a"},\n{"text": "b"}], "n": 1}',
        [(1, "a"), (2, "b")],
    ),
    "lines_in.json": (b'{"text": "a"}\n{"text": "b"}\n', [(1, "a"), (2, "b")]),
    "one.json": (b'{\n "text": "a"\n}\n', [(1, "a")]),
    "table.csv": (b'text,n\n"a, ""x""\n b",1\nNA,null\n', [(2, 'a, "x"\n b'), (4, "NA")]),
    "bom.csv": (b"\xef\xbb\xbftext\r\na\r\n\r\nb\r\n", [(2, "a"), (4, "b")]),
    "table.tsv": (b"text\tn\na,b\t1\n", [(2, "a,b")]),
    "paragraphs.txt": (b"\none\ntwo\r\n\r\n \nthree", [(2, "one\ntwo"), (6, "three")]),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_good_files_are_read_as_written(tmp_path, name, zipped):
    content, expected = GOOD[name]
    content = content.encode() if isinstance(content, str) else content
    path = write(tmp_path / (f"{name}.gz" if zipped else name), gzip.compress(content) if zipped else content)
    found = rows(path)
    assert [(row.line, row.fields["text"]) for row in found] == expected
    assert {row.file for row in found} == {str(path)}


def test_csv_values_stay_text(tmp_path):
    path = write(tmp_path / "a.csv", "a,b,c,d\nNA,1,1.50,true\nnull,,nan,1e5\n")
    assert [list(row.fields.values()) for row in rows(path)] == [
        ["NA", "1", "1.50", "true"],
        ["null", "", "nan", "1e5"],
    ]


def test_a_csv_field_may_be_longer_than_the_csv_module_allows(tmp_path):
    path = write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\n")
    assert len(texts(rows(path))[0]) == 200_000


def test_text_can_be_read_by_line_and_as_a_document(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo\n\nthree\n")
    assert texts(rows(path, format="lines")) == ["one", "two", "three"]
    assert texts(rows(path, format="document")) == ["one\ntwo\n\nthree"]


def test_parquet_is_read_under_any_name(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.parquet").read_bytes())
    expected = [{"text": "a", "n": 1}, {"text": None, "n": 2}]
    for name in ("a.parquet", "a.jsonl"):
        assert [row.fields for row in rows(tmp_path / name)] == expected


BAD = {
    # name: (content, what the message says, where it says it)
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "the last line may be cut off: invalid JSON at column 10", ":2"),
    "comma.jsonl": (b'{"text": "a",}\n', "invalid JSON at column 14: Expecting property name", ":1"),
    "two.jsonl": (b'{"text": "a"} {"text": "b"}\n', "invalid JSON at column 15: there is more after the row", ":1"),
    "nan.jsonl": (b'{"text": "a"}\n{"text": NaN}\n', "NaN is not JSON", ":2"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}\n', "the key 'text' is there twice", ":1"),
    "digits.jsonl": (b'{"text": ' + b"9" * 5000 + b"}\n", "4300", ":1"),
    "list.jsonl": (b'{"text": "a"}\n["a"]\n', "the row is a list, not an object", ":2"),
    "string.jsonl": (b'"a"\n', "the row is text, not an object", ":1"),
    "null.jsonl": (b"null\n", "the row is null, not an object", ":1"),
    "utf8.jsonl": (
        b'{"text": "a"}\n{"text": "\xff"}\n',
        "invalid UTF-8: 0xff at byte 11 of the line, byte 24 of the file",
        ":2",
    ),
    "control.jsonl": (b'{"text": "a\x00"}\n', "invalid JSON at column 12: Invalid control character", ":1"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "nested deeper than 100 levels", ":1"),
    "deep_row.jsonl": (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}\n", "nested deeper than 100 levels", ":1"),
    "utf16.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "looks like UTF-16", ""),
    "utf16_no_bom.csv": ("text\na\n".encode("utf-16-le"), "looks like UTF-16", ""),
    "empty.jsonl": (b"", "the file is empty", ""),
    "blank.jsonl": (b"\n  \n\n", "the file is empty", ""),
    "bom_only.json": (b"\xef\xbb\xbf", "the file is empty", ""),
    "empty_array.json": (b"[]", "the file is empty", ""),
    "open.json": (b'[{"text": "a"},\n{"text": "b"}\n', "the file ends before ']'", ":3"),
    "comma.json": (b'[{"text": "a"},\n]', "a value must follow the comma", ":2"),
    "no_comma.json": (b'[{"text": "a"}\n {"text": "b"}]', "invalid JSON at column 2: expected ','", ":2"),
    "inside.json": (b'[{"text": "a"},\n{"text":\n b}]', "invalid JSON at column 2", ":3"),
    "tail.json": (b'[{"text": "a"}]\n x', "there is more after the end", ":2"),
    "lists.json": (b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}', "several lists: 'a' and 'b'", ""),
    "utf8.json": (b'[\n{"text": "\xff"}]', "invalid UTF-8: 0xff at byte 11 of the line, byte 12 of the file", ":2"),
    "number.json": (b"5", "the row is a number, not an object", ":1"),
    "semicolon.csv": (b"instruction;output\na;b\n", "one column 'instruction;output'", ":1"),
    "ragged.csv": (b"a,b\n1,2\n1,2,3\n", "the row has 3 columns where the header has 2", ":3"),
    "short.csv": (b'a,b\n"x\ny",2\n1\n', "the row has 1 columns where the header has 2", ":4"),
    "quote.csv": (b'a,b\n1,2\n"3,4\n5,6\n', "a quote is opened and never closed", ":3"),
    "after_quote.csv": (b'a,b\n1,"x"y\n', "invalid CSV", ":2"),
    "header.csv": (b"a,b,a\n1,2,3\n", "the column 'a' is there twice", ":1"),
    "no_header.csv": (b",\n1,2\n", "the header is empty", ":1"),
    "utf8.csv": (b"text\na\n\xe9\n", "invalid UTF-8: 0xe9 at byte 1", ":3"),
    "torn.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 9)[:-12], "damaged after", ""),
    "flipped.jsonl.gz": (gzip.compress(b'{"text": "a"}\n')[:-6] + b"\0" * 6, "damaged after", ""),
    "torn.parquet": (b"PAR1 and nothing else", "damaged after 0 rows", ""),
    "other.bin": (b"x", "unknown format '.bin'", ""),
    "bz2.jsonl": (bz2.compress(b'{"text": "a"}\n'), "invalid UTF-8", ":1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_with_their_place(tmp_path, name):
    content, what, where = BAD[name]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        rows(path)
    assert what in caught.value.what
    assert caught.value.where == f"{path}{where}"
    assert caught.value.fix
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_the_delimiter_is_suggested_and_works(tmp_path):
    path = write(tmp_path / "a.csv", "instruction;output\na;b\n")
    with pytest.raises(DataError, match=r"set data\.delimiter: ';'"):
        rows(path)
    assert rows(path, delimiter=";")[0].fields == {"instruction": "a", "output": "b"}


def test_a_missing_file_is_told_with_its_absolute_path_and_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        rows(Path("data/missing.jsonl"))
    assert str(tmp_path / "data" / "missing.jsonl") in caught.value.what
    assert str(tmp_path) in caught.value.where


def test_bad_rows_are_values_so_that_reading_goes_on(tmp_path):
    lines = ['{"text": "a"}', "broken", '{"text": "b"}', '{"text": NaN}', "[]", '{"text": "c"}']
    path = write(tmp_path / "a.jsonl", "\n".join(lines) + "\n")
    chosen = settings()
    [source] = find_files(path, chosen)
    found = list(read_source(source, chosen))
    assert [row.line if isinstance(row, Row) else row.where for row in found] == [
        1, f"{path}:2", 3, f"{path}:4", f"{path}:5", 6,
    ]  # fmt: skip


def test_csv_goes_on_after_a_bad_row(tmp_path):
    path = write(tmp_path / "a.csv", b"text,n\na,1\nb\n\xff,2\nc,3\n")
    chosen = settings()
    found = list(read_source(find_files(path, chosen)[0], chosen))
    assert [row.line if isinstance(row, Row) else row.where for row in found] == [2, f"{path}:3", f"{path}:4", 5]


@pytest.mark.parametrize("name", ["long.jsonl", "long.csv", "long.txt"])
def test_a_long_row_is_passed_over_in_bounded_memory(tmp_path, name):
    """A row of 64 MB with 8 KiB allowed and 40 MB of data segment to spare."""
    path = tmp_path / name
    head = b"text\n" if name.endswith(".csv") else b""
    with path.open("wb") as file:
        file.write(head)
        for _ in range(64):
            file.write(b"x" * 1_000_000)
        file.write(b'\n\n{"text": "after"}\n')
    code = f"""
import resource
from llamahome.config import Config
from llamahome.data.formats import find_files, read_source
chosen = Config.load(None, {{"data.max_row_bytes": "8KiB"}}).data
[source] = find_files({str(path)!r}, chosen)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 40_000_000,) * 2)
for row in read_source(source, chosen):
    print(row)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "the row has 64,000,001 bytes, more than data.max_row_bytes: 8,192" in out
    assert "after" in out


def test_an_unclosed_quote_does_not_swallow_the_file(tmp_path):
    path = write(tmp_path / "a.csv", 'text\n"open\n' + "x\n" * 10_000)
    chosen = settings(max_row_bytes=1000)
    first = next(row for row in read_source(find_files(path, chosen)[0], chosen))
    assert isinstance(first, DataError)
    assert first.where == f"{path}:2"


def test_folders_and_globs_are_searched_in_a_fixed_order(tmp_path):
    for name in ("b.jsonl", "a.csv", "sub/c.jsonl", ".hidden/d.jsonl", "notes.md", "sub/.e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "text\nx\n" if name.endswith("csv") else f'{{"text": "{name}"}}\n')
    assert texts(rows(tmp_path)) == ["x", "b.jsonl", "sub/c.jsonl"]
    assert texts(rows(tmp_path / "**" / "*.jsonl")) == ["b.jsonl", "sub/c.jsonl"]
    assert texts(rows(tmp_path / "b.jsonl", tmp_path)) == ["b.jsonl", "x", "sub/c.jsonl"], "no file twice"


def test_a_folder_without_data_and_a_glob_without_match_are_errors(tmp_path):
    write(tmp_path / "readme.md", "x")
    with pytest.raises(DataError, match="no data files"):
        rows(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        rows(tmp_path / "*.jsonl")


def test_held_out_data_in_a_folder_is_pointed_at(tmp_path, caplog):
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path / name, '{"text": "a"}\n')
    rows(tmp_path)
    assert [name in caplog.text for name in ("test.jsonl looks like held-out", "train.jsonl looks")] == [True, False]


def test_paths_may_have_any_characters(tmp_path):
    path = tmp_path / "dätä [1] 東京" / "a b.jsonl"
    path.parent.mkdir()
    write(path, '{"text": "a"}\n')
    assert texts(rows(path)) == ["a"]


@pytest.mark.parametrize("change", ["append", "truncate", "replace"])
def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, change):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' * 10_000)
    chosen = settings()
    reader = read_rows(find_files(path, chosen), chosen, raises)
    next(reader)
    if change == "append":
        with path.open("a") as file:
            file.write('{"text": "b"}\n')
    elif change == "truncate":
        os.truncate(path, 0)
    else:
        other = write(tmp_path / "b.jsonl", '{"text": "c"}\n' * 10_000)
        other.replace(path)
    with pytest.raises(DataError, match="the file changed while it was being read"):
        list(reader)


@pytest.mark.parametrize("kind", ["folder", "pipe", "unreadable"])
def test_what_is_no_readable_file_is_refused(tmp_path, kind, monkeypatch):
    path = tmp_path / "a.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "unreadable":
        path.symlink_to("/proc/self/mem")
    else:
        path.mkdir()
    with pytest.raises(DataError):
        rows(path)


@pytest.mark.parametrize("path", ["x" * 5000, "~no-such-user/data.jsonl", "a\0b.jsonl", ""])
def test_impossible_paths_are_one_line(path):
    with pytest.raises(DataError) as caught:
        find_files(path, settings())
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_a_network_fails_quickly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_hub_answers", lambda: False)
    with pytest.raises(DataError, match="no dataset 'org/name': the hub cannot be reached"):
        list(read_rows(find_files("org/name", settings()), settings(), raises))


def test_a_hub_dataset_is_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["a", "b"]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(formats, "open_hub_dataset", {"org/name-v1.5:dev": table}.get)
    found = list(read_rows(find_files("org/name-v1.5:dev", settings()), settings(), raises))
    assert [(row.line, row.fields) for row in found] == [(1, {"text": "a"}), (2, {"text": "b"})]


def test_unicode_escapes_and_pairs_are_text(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "😀 é"}) + "\n")
    assert texts(rows(path)) == ["😀 é"]
