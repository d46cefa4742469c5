"""5,000 damaged files for all readers there are: refused with one error of ours, or understood.

`make fuzz` runs five times as many; a failure names the seed of its case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sidepath.errors import DamagedAdapter
from tests.fuzz.mutate import Draft
from tests.fuzz.reader import Reader
from tests.fuzz.readers import READERS
from tests.fuzz.run import Watch, case, tried

COUNT = 5000
ROOT = Path(__file__).resolve().parents[2]


def test_every_damaged_file_is_refused_or_understood() -> None:
    """In a process of its own, whose memory is limited. One test: workers must not share it out."""
    variables = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", "--count", str(COUNT)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **variables, "PYTHONPATH": path},
    )
    assert ran.stdout, f"the fuzz ended with {ran.returncode}: {ran.stderr[-3000:]}"
    document = json.loads(ran.stdout)
    outcomes: dict[str, Any] = document["readers"]
    assert list(outcomes) == [reader.name for reader in READERS]
    failures = [failure for one in outcomes.values() for failure in one["failures"]]
    assert not failures, "\n".join(failures[:20])
    for name, one in outcomes.items():
        # Lines that are no rows are counted, and refused by what reads all of the data.
        assert one["refused"] > 0 or name.startswith("data "), name
        assert one["accepted"] > 0, f"{name}: a fuzz in which nothing is read proves nothing"
    assert sum(one["refused"] + one["accepted"] for one in outcomes.values()) >= COUNT
    assert document["resident_bytes_grown"] < 512 * 2**20


# The harness can fail


def reader(read: Any, says: Any = lambda folder: (folder / "a").read_bytes()) -> Reader:
    return Reader("x", lambda: {"a": b"12"}, read, says)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Draft({"a": b"12"}).write(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def raises(error: Exception) -> Any:
    def read(_: Path) -> Any:
        raise error

    return read


def allocates(_: Path) -> Any:
    try:
        raise MemoryError
    except MemoryError as error:
        raise DamagedAdapter("too large") from error


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (raises(ValueError("no")), "ValueError: no"),
        (lambda folder: b"1", "understood"),
        (lambda folder: (folder / "b").write_text("x") and b"12", "to write"),
        (lambda folder: (folder / "a").rename(folder / "b"), "os.rename"),
        (lambda folder: __import__("pickle").loads(b"cos\nsystem\n."), "pickle.find_class"),
        (raises(DamagedAdapter("")), "without a message"),
        (allocates, "memory"),
    ],
)
def test_what_counts_as_a_failure(folder: Path, watch: Watch, read: Any, says: str) -> None:
    assert says in (tried(reader(read), folder, watch) or "")


def test_what_counts_as_right(folder: Path, watch: Watch) -> None:
    assert tried(reader(raises(DamagedAdapter("damaged"))), folder, watch) is None
    assert tried(reader(lambda folder: (folder / "a").read_bytes()), folder, watch) == ""


def test_a_plain_reader_that_cannot_read_what_was_understood(folder: Path, watch: Watch) -> None:
    says = raises(ValueError("no such thing"))
    assert "a plain reader cannot" in (tried(reader(lambda _: 1, says), folder, watch) or "")


def test_a_case_can_be_made_again() -> None:
    one = READERS[0]
    clean = one.files()
    drafts = [case(one, clean, f"0/{one.name}/{number}") for number in range(20)]
    again = [case(one, clean, f"0/{one.name}/{number}") for number in range(20)]
    assert [draft.files for draft in drafts] == [draft.files for draft in again]
    assert len({str(draft.done) for draft in drafts}) > 10
