"""The run table: one row a finished trial, in SQLite; a killed comparison goes on from it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sidepath.errors import StoreError, WriteFailed

NAME = "runs.sqlite"
VERSION = 1
_UNREADABLE = (sqlite3.Error, UnicodeDecodeError)
"""What is raised for a damaged file; the second when the message would quote its bytes."""
_COLUMNS = "digest TEXT PRIMARY KEY, described TEXT NOT NULL, result TEXT NOT NULL"


class RunTable:
    """Trials that are done, by the digest of everything that determines them.

    A row is there whole or not at all (a transaction each, written ahead, synced to the disk
    before `put` returns); reading is safe beside a writer.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder's table, or make one. Errors: `StoreError` for a file that is none."""
        self.path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteFailed(
                f"the run table cannot be written: {error.strerror}", where=self.path
            ) from error
        try:
            self._connection = sqlite3.connect(self.path, isolation_level=None, timeout=30)
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._prepare()
        except BaseException as error:
            self._connection.close()
            if isinstance(error, _UNREADABLE):
                raise self._unusable(error) from error
            raise

    def _unusable(self, error: Exception) -> StoreError:
        return StoreError(
            "the run table cannot be read",
            where=self.path,
            found=error,
            hint="choose another --output, or move that file away",
        )

    def _prepare(self) -> None:
        found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        tables = self._connection.execute("SELECT name FROM sqlite_master").fetchall()
        if not tables and found == 0:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute(f"CREATE TABLE IF NOT EXISTS trials ({_COLUMNS})")
            self._connection.execute(f"PRAGMA user_version={VERSION}")
            self._connection.execute("COMMIT")
            return
        # An index that does not fit its rows would make trials that are done seem to be none.
        said = self._connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if said != "ok":
            raise self._unusable(sqlite3.DatabaseError(said))
        if found != VERSION:
            raise StoreError(
                "the run table is of another version",
                where=self.path,
                found=found,
                expected=VERSION,
                hint="choose another --output",
            )

    def get(self, digest: str) -> dict[str, Any] | None:
        """The result of a trial that is done, or None. Errors: `StoreError` for a damaged file."""
        row = self._asked("SELECT result FROM trials WHERE digest = ?", digest)
        try:
            return None if row is None else dict(json.loads(row[0]))
        except (ValueError, TypeError, RecursionError) as error:
            raise self._unusable(error) from error

    def _asked(self, question: str, *values: str) -> Any:
        try:
            return self._connection.execute(question, values).fetchone()
        except _UNREADABLE as error:
            raise self._unusable(error) from error

    def put(self, digest: str, described: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Record a trial. Errors: `WriteFailed`; then nothing of it is there."""
        row = (digest, json.dumps(described, sort_keys=True), json.dumps(result, sort_keys=True))
        try:
            self._connection.execute("INSERT OR REPLACE INTO trials VALUES (?, ?, ?)", row)
        except sqlite3.Error as error:
            raise WriteFailed("the run table takes no row", where=self.path, found=error) from error

    def __len__(self) -> int:
        return int(self._asked("SELECT COUNT(*) FROM trials")[0])

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def __enter__(self) -> RunTable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
