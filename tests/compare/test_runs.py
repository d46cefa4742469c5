"""The run table: rows whole or not at all, also when its writer is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sidepath.compare.runs import NAME, RunTable
from sidepath.errors import StoreError


def test_what_is_put_is_there_for_the_next_one(tmp_path: Path) -> None:
    with RunTable(tmp_path / "a" / "b") as table:
        assert table.get("x") is None
        table.put("x", {"seed": 1}, {"value": 0.1 + 0.2})
        table.put("x", {"seed": 1}, {"value": 0.5})
    with RunTable(tmp_path / "a" / "b") as table:
        assert (table.get("x"), len(table)) == ({"value": 0.5}, 1)


def test_a_killed_writer_leaves_whole_rows(tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from sidepath.compare.runs import RunTable
        table = RunTable(Path({str(tmp_path)!r}))
        for at in range(100_000):
            table.put(str(at), {{}}, {{"value": at}})
            print(at, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        seen = [int(writer.stdout.readline()) for _ in range(5)]
        os.kill(writer.pid, signal.SIGKILL)
    with RunTable(tmp_path) as table:
        assert all(table.get(str(at)) == {"value": at} for at in seen)
        assert [table.get(str(at)) for at in range(len(table))] == [
            {"value": at} for at in range(len(table))
        ]


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be read as one" * 9])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(StoreError, match="cannot be read"):
        RunTable(tmp_path)
    assert (tmp_path / NAME).read_bytes() == content


def test_an_index_that_does_not_fit_its_rows_is_refused(tmp_path: Path) -> None:
    with RunTable(tmp_path) as table:
        table.put("a", {}, {})
        page = table._connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE type = 'index'"
        ).fetchone()[0]
        size = table._connection.execute("PRAGMA page_size").fetchone()[0]
        table._connection.execute("PRAGMA journal_mode=DELETE")
    content = bytearray((tmp_path / NAME).read_bytes())
    at = content.index(b"a", page * size - 64)
    content[at] = ord("b")
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(StoreError, match="cannot be read"):
        RunTable(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 3, -1])
def test_names_in_it_that_are_no_text_are_refused(tmp_path: Path, count: int) -> None:
    with RunTable(tmp_path) as table:
        table.put("a", {}, {})
        table._connection.execute("PRAGMA journal_mode=DELETE")
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content.replace(b"trials", b"tri\xc5ls", count))
    with pytest.raises(StoreError, match="cannot be read"), RunTable(tmp_path) as table:
        table.get("a")


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_a_row_that_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    with RunTable(tmp_path) as table:
        table.put("a", {}, {})
        table._connection.execute("UPDATE trials SET result = ?", (text,))
        with pytest.raises(StoreError, match="cannot be read"):
            table.get("a")


def test_another_version_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / NAME)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(StoreError, match="another version"):
        RunTable(tmp_path)
