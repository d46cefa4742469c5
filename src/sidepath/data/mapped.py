"""Examples in memory-mapped files, for data larger than memory.

Three files in a temporary folder: the tokens (int32, the supervised ones with their bits
inverted, so that an id and its mask are one number), the references (UTF-8), and a table with
one record a row. An `Example` is built when it is asked for; the folder goes with the last of
the objects that read it, or when the process ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from sidepath.data.example import Example
from sidepath.errors import DataError

_RECORD = np.dtype(
    [
        ("start", np.int64),
        ("tokens", np.int32),
        ("text", np.int64),
        ("bytes", np.int32),
        ("line", np.int64),
        ("prompt_length", np.int32),
        ("label", np.int32),
        ("truncated", np.bool_),
        ("ends", np.bool_),
    ]
)
_NONE = -1
"""No label; no reference (in `bytes`)."""
_FILES = ("tokens", "texts", "records")


class MappedExamples(Sequence[Example]):
    """Rows of the files in a folder, all of them or those chosen, in the order chosen."""

    def __init__(self, folder: Folder, chosen: NDArray[np.int64] | None = None) -> None:
        self._folder = folder
        self._tokens = _mapped(folder.path / "tokens", np.dtype(np.int32))
        self._texts = _mapped(folder.path / "texts", np.dtype(np.uint8))
        self._records = _mapped(folder.path / "records", _RECORD)
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._records if self._chosen is None else self._chosen)

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> MappedExamples: ...
    def __getitem__(self, row: int | slice) -> Example | MappedExamples:
        """One example, built now; or the examples of a slice, which are not built."""
        if isinstance(row, slice):
            return self.chosen(range(*row.indices(len(self))))
        at = range(len(self))[row]
        return self._built(self._records[at if self._chosen is None else self._chosen[at]])

    def __iter__(self) -> Iterator[Example]:
        return (self[row] for row in range(len(self)))

    def chosen(self, rows: Sequence[int]) -> MappedExamples:
        """These rows only, in this order; nothing is copied."""
        picked = np.asarray(rows, dtype=np.int64)
        return MappedExamples(
            self._folder, picked if self._chosen is None else self._chosen[picked]
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        tokens = self._records["tokens"]
        return (tokens if self._chosen is None else tokens[self._chosen]).astype(np.int64)

    def _built(self, record: Any) -> Example:
        start, text = int(record["start"]), int(record["text"])
        coded = self._tokens[start : start + int(record["tokens"])]
        supervised_T = coded < 0
        size, label = int(record["bytes"]), int(record["label"])
        reference = None if size == _NONE else self._texts[text : text + size].tobytes().decode()
        return Example(
            np.where(supervised_T, ~coded, coded).astype(np.int64),
            supervised_T,
            int(record["line"]),
            prompt_length=int(record["prompt_length"]),
            reference=reference,
            label=None if label == _NONE else label,
            truncated=bool(record["truncated"]),
            ends=bool(record["ends"]),
        )

    def __reduce__(self) -> Any:
        """A worker process maps the same files, and does not own them."""
        return MappedExamples, (self._folder, self._chosen)


class Folder:
    """A folder that is removed with this object, by the process that made it alone."""

    def __init__(self, path: Path, *, owned: bool) -> None:
        self.path = path
        if owned:
            self._remove = weakref.finalize(self, _remove, path, os.getpid())

    def __reduce__(self) -> Any:
        return _unowned, (self.path,)


def _unowned(path: Path) -> Folder:
    return Folder(path, owned=False)


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    # The plain view is quicker to slice than the memmap, and keeps it open.
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


class MappedWriter:
    """Writes examples into such files; `close` on every way out."""

    def __init__(self) -> None:
        self._folder = Folder(Path(tempfile.mkdtemp(prefix="sidepath-data-")), owned=True)
        self._files: dict[str, BinaryIO] = {
            name: (self._folder.path / name).open("wb") for name in _FILES
        }
        self._tokens = self._bytes = self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def add(self, examples: Iterable[Example]) -> None:
        """Append examples.

        Raises:
            DataError: the files cannot be written (no room left in the temporary folder).
        """
        records = []
        try:
            for example in examples:
                coded = np.where(example.supervised_T, ~example.ids_T, example.ids_T)
                self._files["tokens"].write(coded.astype(np.int32).tobytes())
                text = None if example.reference is None else example.reference.encode()
                self._files["texts"].write(text or b"")
                records.append(self._record(example, text))
            self._files["records"].write(np.array(records, dtype=_RECORD).tobytes())
        except OSError as error:
            raise self._failed(error) from error
        self._rows += len(records)

    def _failed(self, error: OSError) -> DataError:
        return DataError(
            "the tokenised rows cannot be written",
            where=self._folder.path,
            found=error.strerror or error,
            hint="make room there, or name another folder in the variable TMPDIR",
        )

    def _record(self, example: Example, text: bytes | None) -> tuple[Any, ...]:
        record = (
            *(self._tokens, len(example.ids_T), self._bytes),
            _NONE if text is None else len(text),
            *(example.line, example.prompt_length),
            _NONE if example.label is None else example.label,
            *(example.truncated, example.ends),
        )
        self._tokens += len(example.ids_T)
        self._bytes += len(text or b"")
        return record

    def finish(self, class_ids: Sequence[int]) -> MappedExamples:
        """The examples written, with each label replaced by `class_ids[label]`."""
        try:
            for file in self._files.values():
                file.close()
        except OSError as error:
            raise self._failed(error) from error
        path = self._folder.path / "records"
        if class_ids and path.stat().st_size:
            records = np.memmap(path, dtype=_RECORD, mode="r+")
            records["label"] = np.asarray(class_ids)[records["label"]]
            records.flush()
        return MappedExamples(self._folder)

    def close(self) -> None:
        """Close the files; the folder goes when nothing reads it. Raises nothing: where the disk
        is full, closing fails as the write did, and that error is under way.
        """
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
