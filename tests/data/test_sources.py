from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sidepath.data import tables
from sidepath.data.sources import Row, Source, sources_of
from sidepath.errors import DataError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": 'c "d",\te', "completion": "f\ng"}]


def read(place: Any, limit: int | None = None) -> tuple[list[Row], Source]:
    source = sources_of(place, limit)[0]
    return [row for rows in source.chunks() for row in rows], source


def faulty_lines(source: Source) -> list[int]:
    return [line for line, _ in source.faults.kept]


def _write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.v1.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    text = "\ufeff" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1])
    rows, _ = read(_write(tmp_path / name, text))
    assert [dict(row.fields) for row in rows] == ROWS
    assert [row.line for row in rows] == [1, 3]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_keeps_quoted_commas_and_line_breaks(tmp_path: Path, name: str) -> None:
    text = 'prompt,completion\r\na,b\r\n"c ""d"",\te","f\ng"\r\nx,y\r\n'
    rows, _ = read(_write(tmp_path / name, text))
    assert [dict(row.fields) for row in rows] == [*ROWS, {"prompt": "x", "completion": "y"}]
    assert [row.line for row in rows] == [2, 3, 5]


def test_tsv_takes_quotation_marks_as_they_are(tmp_path: Path) -> None:
    rows, _ = read(_write(tmp_path / "a.tsv", 'sentence\tlabel\n"oh\t1\n'))
    assert dict(rows[0].fields) == {"sentence": '"oh', "label": "1"}


def test_json_list_and_list_of_mappings(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.json", json.dumps(ROWS))
    assert read(file)[0] == read(ROWS)[0]


def test_limit_leaves_the_rest_unread(tmp_path: Path) -> None:
    text = json.dumps(ROWS[0]) + "\nbroken"
    rows, source = read(_write(tmp_path / "a.jsonl", text), 1)
    assert len(rows) == 1
    assert not source.faults


def test_every_broken_line_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(ROWS[0])] * 6 + ["{broken", "[1]", "[" * 100_000, json.dumps(ROWS[1])]
    rows, source = read(_write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert faulty_lines(source) == [7, 8, 9]
    assert len(rows) == 7


def test_a_record_with_too_few_fields_is_a_fault(tmp_path: Path) -> None:
    _, source = read(_write(tmp_path / "a.csv", "a,b\n1,2\n1\n1,2,3\n"))
    assert faulty_lines(source) == [3, 4]


def test_an_open_quotation_is_a_fault(tmp_path: Path) -> None:
    _, source = read(_write(tmp_path / "a.csv", 'a,b\n1,2\n"1,2\n'))
    assert faulty_lines(source) == [3]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.parquet", b"", "damaged, or is none"),
        ("a", b"", "no known format"),
        ("a.json", b"{}", "one list of rows"),
        ("a.json", b"[", "not JSON"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 100, mtime=0)[:-12], "cannot be read"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.jsonl.gz"])
def test_a_line_that_would_fill_the_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LINE", 20)
    path = _write(tmp_path / name, "x" * 21 + "\n")
    with pytest.raises(DataError, match="longer than 20 characters"):
        read(path)
    assert read(_write(tmp_path / name, "x" * 19 + "\n"))[0] == []


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="directory"):
        read(tmp_path / "folder.jsonl")


def test_a_column_named_twice_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label,text,,\na,1,b,,\n")
    rows, found = read(path)
    assert not rows
    assert found.faults.kept == [(1, "the header names text twice; nothing was read")]


def test_a_field_may_be_as_long_as_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "ab" * 100_000 + "\n")
    ((row,), _) = read(path)
    assert len(row.fields["text"]) == 200_000
