from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidepath.data.dataset import Data, load_data
from sidepath.data.example import Example
from sidepath.data.mapped import MappedExamples, MappedWriter
from sidepath.errors import DataError

TALK = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "completion": [{"prompt": "p" * (at % 4), "completion": f"ä{at}"} for at in range(30)],
    "text": [{"text": "t" * (at % 7 + 1)} for at in range(30)],
    "classify": [{"text": f"t{at}", "label": "cab"[at % 3]} for at in range(30)],
    "messages": [
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": f"a{at}"}]}
        for at in range(30)
    ],
}


def same(one: Example, other: Example) -> bool:
    arrays = np.array_equal(one.ids_T, other.ids_T)
    masks = np.array_equal(one.supervised_T, other.supervised_T)
    names = ("line", "prompt_length", "reference", "label", "truncated", "ends")
    rest = all(getattr(one, name) == getattr(other, name) for name in names)
    return arrays and masks and rest and one.ids_T.dtype == other.ids_T.dtype


@pytest.mark.parametrize("schema", ROWS)
def test_streamed_data_are_the_data(tokenizer: Any, schema: str) -> None:
    tokenizer.chat_template = TALK
    kept = load_data(ROWS[schema], tokenizer, max_tokens=14)
    streamed = load_data(ROWS[schema], tokenizer, max_tokens=14, stream=True)
    assert isinstance(kept.examples, tuple)
    assert isinstance(streamed.examples, MappedExamples)
    assert len(kept) == len(streamed) == 30
    assert all(map(same, kept.examples, streamed.examples))
    assert streamed.digest == kept.digest
    assert streamed.audit == kept.audit
    assert streamed.lengths == kept.lengths
    assert streamed.largest_id == kept.largest_id
    assert streamed.labels == kept.labels
    assert same(streamed.example(3, seed=0, epoch=0), kept.examples[3])
    for one, other in zip(kept.split(0.2, seed=1), streamed.split(0.2, seed=1), strict=True):
        assert isinstance(other.examples, MappedExamples)
        assert one.digest == other.digest
        assert one.lengths == other.lengths
        assert [one.place(row) for row in range(len(one))] == [
            other.place(row) for row in range(len(other))
        ]


def test_positions_and_slices(tokenizer: Any) -> None:
    examples = load_data(ROWS["text"], tokenizer, stream=True).examples
    assert [example.line for example in examples[3:9:2]] == [4, 6, 8]
    assert examples[-1].line == 30
    assert [example.line for example in examples[::-1][:2]] == [30, 29]
    for row in (30, -31):
        with pytest.raises(IndexError):
            examples[row]


def folder_of(data: Data) -> Path:
    assert isinstance(data.examples, MappedExamples)
    return data.examples._folder.path


def test_the_files_go_with_the_last_that_reads_them(tokenizer: Any) -> None:
    data = load_data(ROWS["text"], tokenizer, stream=True)
    folder = folder_of(data)
    part = data.subset([4, 2])
    del data
    gc.collect()
    assert folder.is_dir()
    assert [example.line for example in part.examples] == [5, 3]
    del part
    gc.collect()
    assert not folder.exists()


def test_another_process_reads_the_files_and_leaves_them(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data(ROWS["text"], tokenizer, stream=True)
    packed = pickle.dumps(data.examples)
    assert len(packed) < 1000
    other = pickle.loads(packed)
    assert all(map(same, data.examples, other))
    folder = folder_of(data)
    del other
    gc.collect()
    assert folder.is_dir()
    # A forked process has the finalizer of its parent, too.
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: -1)
        del data
        gc.collect()
    assert folder.is_dir()
    shutil.rmtree(folder)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_nothing_is_left_of_data_with_faults(tokenizer: Any, temporary: Path) -> None:
    with pytest.raises(DataError, match="row 31"):
        load_data([*ROWS["text"], {"text": 3}], tokenizer, stream=True)
    gc.collect()
    assert not list(temporary.iterdir())


def test_a_full_disk_is_one_error(
    tokenizer: Any, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = MappedWriter()
    examples = load_data(ROWS["text"], tokenizer).examples
    tokens = writer._files["tokens"]
    monkeypatch.setitem(writer._files, "tokens", Full())
    with pytest.raises(DataError, match="No space left"):
        writer.add(examples)
    monkeypatch.undo()
    tokens.close()
    writer.close()


def test_a_transform_cannot_be_streamed(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="stream and transform do not go together"):
        load_data(ROWS["text"], tokenizer, stream=True, transform=lambda fields: fields)


def peak_of(make: Callable[[], Data]) -> int:
    """Most bytes held while data are loaded, counted and read once."""
    gc.collect()
    tracemalloc.start()
    try:
        data = make()
        assert data.audit.rows == len(data.lengths)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed data grow by some bytes a row (length, digest), data in memory by an example."""
    monkeypatch.setattr("sidepath.data.sources.CHUNK", 256)
    path = tmp_path / "rows.jsonl"
    rows = (json.dumps({"text": f"row {at} " + "x" * 40}) for at in range(5000))
    path.write_text("\n".join(rows))

    def growth(stream: bool) -> float:
        def peak(limit: int) -> int:
            return peak_of(lambda: load_data(path, tokenizer, limit=limit, stream=stream))

        peak(10)  # what is imported or compiled once is not counted
        return (peak(5000) - peak(1000)) / 4000

    assert growth(stream=False) > 400
    assert growth(stream=True) < 100


def numbered(count: int, broken: Callable[[int], bool]) -> Iterator[str]:
    for at in range(1, count + 1):
        yield '{"text": 3}\n' if broken(at) else f'{{"text": "row {at}"}}\n'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_broken_row_in_the_middle_is_named(
    tokenizer: Any, tmp_path: Path, count: int, stream: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        file.writelines(numbered(count, lambda at: at == count // 2))
    with pytest.raises(DataError, match="the data have faults") as caught:
        load_data(path, tokenizer, stream=stream)
    assert caught.value.faults == [f'line {count // 2}: "text": expected text, found int']


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_faults_are_counted_and_the_first_are_kept(
    tokenizer: Any, tmp_path: Path, count: int
) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        file.writelines(numbered(count, lambda at: at > 10))
    load_data(path, tokenizer, limit=1)
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            load_data(path, tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    faults = caught.value.faults
    assert [fault.split(":")[0] for fault in faults[:19]] == [f"line {at}" for at in range(11, 30)]
    assert faults[19:] == [f"and {count - 10 - 19:,} more faults"]
    assert str(caught.value).endswith(faults[-1])
    assert peak < 8 << 20


@pytest.mark.slow
def test_many_rows_are_streamed_in_little_memory(tokenizer: Any, tmp_path: Path) -> None:
    """In memory these rows would take some 90 MiB."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        file.writelines(numbered(100_000, lambda _: False))
    peak = peak_of(lambda: load_data(path, tokenizer, stream=True))
    assert peak < 20 << 20


def test_a_disk_still_full_when_files_are_closed_hides_no_error(tokenizer: Any) -> None:
    class Full:
        def close(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = MappedWriter()
    for name, file in writer._files.items():
        file.close()
        writer._files[name] = Full()  # type: ignore[assignment]
    with pytest.raises(DataError, match="cannot be written"), contextlib.closing(writer):
        writer.finish([])
