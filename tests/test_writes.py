"""Every write, failed and killed at each of its file operations: the old output or the new one."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest

from sidepath.errors import SidepathError
from tests.faults import KILLED, Faults, forked
from tests.writes import WRITES, Sources, Target, sources

STEPS = [11, pytest.param(1, marks=pytest.mark.slow)]
"""Every so many operations; one by one in the slow tests."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def target(kind: str, given: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    # A temporary folder made elsewhere and left there is an orphan as well.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "place"))
    return Target(kind, given, tmp_path / "place")


def operations(target: Target) -> int:
    with Faults(0, under=target.place) as faults:
        target.write("new")
    assert target.state() == "new"
    target.write("old")
    return len(faults.names)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", WRITES)
def test_each_file_operation_fails_once(kind: str, step: int, target: Target) -> None:
    for number in range(1, operations(target) + 1, step):
        error = errno.ENOSPC if number % 2 else errno.EIO
        with Faults(number, under=target.place, error=error) as faults:
            try:
                target.write("new")
                expected = "new"
            except SidepathError:
                expected = "old"
        assert faults.hit
        assert target.state() == expected, (number, faults.names[-1])
        target.write("old")
        assert target.orphans() == [], (number, faults.names[-1])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", WRITES)
def test_each_file_operation_is_the_last_one(kind: str, step: int, target: Target) -> None:
    seen = set()
    for number in range(1, operations(target) + 1, step):

        def dying(number: int = number) -> None:
            with Faults(number, under=target.place, kill=True):
                target.write("new")

        assert forked(dying) == KILLED, number
        seen.add(target.state())
        assert seen <= {"old", "new"}, number
        target.write("old")
        assert target.orphans() == [], number
    assert step > 1 or seen == {"old", "new"}


def test_what_counts_as_a_mixture(given: Sources, tmp_path: Path) -> None:
    target = Target("save", given, tmp_path / "place")
    (target.out / "sidepath.json").write_bytes(target.whole["new"]["sidepath.json"])
    with pytest.raises(AssertionError, match="a mixture"):
        target.state()
