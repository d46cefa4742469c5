"""Readers of data files, and of texts to calibrate with."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidepath.cli.calibration import MAX_ROWS, calibration_of
from sidepath.data.sources import open_source
from tests.fuzz.reader import Reader

# Data


def jsonl_rows() -> bytes:
    rows = [{"prompt": f"count {n}", "completion": f"{n} ü", "n": n / 3} for n in range(12)]
    return "".join(
        json.dumps(row, ensure_ascii=n % 2 > 0) + "\n" for n, row in enumerate(rows)
    ).encode()


def packed_rows() -> bytes:
    return gzip.compress(jsonl_rows(), mtime=0)


def json_rows() -> bytes:
    return b"[" + b",".join(jsonl_rows().splitlines()) + b"]"


def table_rows(delimiter: str) -> bytes:
    out = io.StringIO()
    rows = csv.writer(out, delimiter=delimiter)
    rows.writerow(["text", "label"])
    rows.writerows([f'a "film" {n}', n % 2] for n in range(12))
    return out.getvalue().encode()


def parquet_rows() -> bytes:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(
        {"text": [f"film {n}" for n in range(40)], "label": [n % 2 for n in range(40)]}
    )
    out = io.BytesIO()
    parquet.write_table(table, out, write_page_checksum=True)
    return out.getvalue()


def data_reader(
    name: str, content: Callable[[], bytes], says: Callable[[Path], Any], **more: Any
) -> Reader:
    """A reader of a data file: its rows, and how many lines are none."""

    def read(folder: Path) -> Any:
        source = open_source(folder / name)
        rows = [dict(row.fields) for chunk in source.chunks() for row in chunk]
        return repr(rows), source.faults.count

    return Reader(
        f"data {name}",
        lambda: {name: content()},
        read,
        lambda folder: says(folder / name),
        places=False,
        **more,
    )


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    return data.decode("utf-8-sig", "surrogateescape")


def jsonl_says(path: Path) -> Any:
    rows, faults = [], 0
    for text in io.StringIO(_decoded(path), newline=""):
        try:
            value = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError):
            value = "no JSON"
        if isinstance(value, dict):
            rows.append(value)
        elif text.strip():
            faults += 1
    return repr(rows), faults


def json_says(path: Path) -> Any:
    text = _decoded(path)
    values = json.loads(text) if text.strip() else []
    assert isinstance(values, list)
    rows = [value for value in values if isinstance(value, dict)]
    return repr(rows), len(values) - len(rows)


def csv_says(path: Path) -> Any:
    return _table_says(csv.reader(io.StringIO(_decoded(path), newline=""), strict=True))


def tsv_says(path: Path) -> Any:
    text = io.StringIO(_decoded(path), newline="")
    return _table_says(csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE))


def _table_says(reader: Any) -> Any:
    records, faults = [], 0
    try:
        for record in reader:
            records += [record] if record else []
    except csv.Error:
        faults += 1
    head, body = (records[0], records[1:]) if records else ([], [])
    rows = [dict(zip(head, record, strict=True)) for record in body if len(record) == len(head)]
    return repr(rows), faults + len(body) - len(rows)


def parquet_says(path: Path) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
        return repr(file.read().to_pylist()), 0


# The texts that a merge is measured on


def calibration_reader(name: str, content: bytes, says: Callable[[Path], Any]) -> Reader:
    return Reader(
        f"calibration {name}",
        lambda: {name: content},
        lambda folder: calibration_of(str(folder / name)),
        lambda folder: says(folder / name),
        share=0.5,
        places=False,
    )


TEXT = "A first line, ü.\n\n  A second one.  \r\nThe last".encode()
TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SPOKEN = [{"text": "Once upon"}, {"prompt": "1, 2", "completion": "3"}, {"messages": TALK}]


def text_says(path: Path) -> Any:
    lines = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=None)
    return [line.strip() for line in lines if line.strip()][:MAX_ROWS]


def spoken_says(path: Path) -> Any:
    lines = [line for line in io.StringIO(_decoded(path), newline="") if line.strip()]
    return [_said(json.loads(line)) for line in lines]


def _said(row: Any) -> str:
    said = [row.get(name) for name in ("text", "prompt", "completion")]
    talk = row.get("messages") or []
    said += [one.get("content") for one in talk if isinstance(one, dict)]
    return "\n".join(text for text in said if isinstance(text, str) and text)


READERS = (
    data_reader("a.jsonl", jsonl_rows, jsonl_says),
    # gzip itself goes through zeros behind its data byte by byte: a long time, and no memory.
    data_reader("a.jsonl.gz", packed_rows, jsonl_says, share=0.5, sparse=False),
    # A .json file is read whole, however large: the user has been told of .jsonl.
    data_reader("a.json", json_rows, json_says, share=0.5, sparse=False),
    data_reader("a.csv", lambda: table_rows(","), csv_says, share=0.5),
    data_reader("a.tsv", lambda: table_rows("\t"), tsv_says, share=0.5),
    data_reader("a.parquet", parquet_rows, parquet_says),
    calibration_reader("a.txt", TEXT, text_says),
    calibration_reader(
        "a.jsonl", "".join(json.dumps(row) + "\n" for row in SPOKEN).encode(), spoken_says
    ),
)
