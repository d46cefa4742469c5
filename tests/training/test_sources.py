from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from sidepath.errors import DataError
from sidepath.training.sources import read_source

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": 'c "d",\te', "completion": "f\ng"}]


def _write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.v1.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    text = "\ufeff" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1])
    found = read_source(_write(tmp_path / name, text), None)
    assert [dict(row.fields) for row in found.rows] == ROWS
    assert [row.line for row in found.rows] == [1, 3]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_keeps_quoted_commas_and_line_breaks(tmp_path: Path, name: str) -> None:
    text = 'prompt,completion\r\na,b\r\n"c ""d"",\te","f\ng"\r\nx,y\r\n'
    found = read_source(_write(tmp_path / name, text), None)
    assert [dict(row.fields) for row in found.rows] == [*ROWS, {"prompt": "x", "completion": "y"}]
    assert [row.line for row in found.rows] == [2, 3, 5]


def test_tsv_takes_quotation_marks_as_they_are(tmp_path: Path) -> None:
    found = read_source(_write(tmp_path / "a.tsv", 'sentence\tlabel\n"oh\t1\n'), None)
    assert dict(found.rows[0].fields) == {"sentence": '"oh', "label": "1"}


def test_json_list_and_list_of_mappings(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.json", json.dumps(ROWS))
    assert read_source(file, None).rows == read_source(ROWS, None).rows


def test_limit_leaves_the_rest_unread(tmp_path: Path) -> None:
    text = json.dumps(ROWS[0]) + "\nbroken"
    found = read_source(_write(tmp_path / "a.jsonl", text), 1)
    assert len(found.rows) == 1
    assert found.faults == []


def test_every_broken_line_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(ROWS[0])] * 6 + ["{broken", "[1]", "[" * 100_000, json.dumps(ROWS[1])]
    found = read_source(_write(tmp_path / "a.jsonl", "\n".join(lines)), None)
    assert [fault.split(":")[0] for fault in found.faults] == ["line 7", "line 8", "line 9"]
    assert len(found.rows) == 7


def test_a_record_with_too_few_fields_is_a_fault(tmp_path: Path) -> None:
    found = read_source(_write(tmp_path / "a.csv", "a,b\n1,2\n1\n1,2,3\n"), None)
    assert [fault.split(":")[0] for fault in found.faults] == ["line 3", "line 4"]


def test_an_open_quotation_is_a_fault(tmp_path: Path) -> None:
    found = read_source(_write(tmp_path / "a.csv", 'a,b\n1,2\n"1,2\n'), None)
    assert [fault.split(":")[0] for fault in found.faults] == ["line 3"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.parquet", b"", "no known format"),
        ("a", b"", "no known format"),
        ("a.json", b"{}", "one list of rows"),
        ("a.json", b"[", "not JSON"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 100)[:-12], "cannot be read"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_source(tmp_path / name, None)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_source(tmp_path / "none.jsonl", None)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="directory"):
        read_source(tmp_path / "folder.jsonl", None)
