"""Trials through Ray: held against a stand-in that answers as Ray's documentation says."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from sidepath.compare.setting import Setting, Trial
from sidepath.compare.workers import Workers
from sidepath.errors import TrainError

from .kit import entrants, setting


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


@dataclass
class Ray:
    """`init`, `remote`, `wait`, `get` and `cancel` of Ray, in this process.

    Ray itself is in none of our environments: this shows that the trials are handed out and
    collected as its documentation asks, not that a cluster carries them out. Like Ray it gives
    each task copies of function and arguments, runs nothing until it is waited for, and finishes
    in an order of its own: the last one handed out is ready first.
    """

    begun: dict[str, Any] = field(default_factory=dict)
    """What `init` was told."""
    tasks: dict[int, bytes] = field(default_factory=dict)
    """Handed out and not collected."""
    handed_out: int = 0
    most: int = 0
    """Tasks at once."""
    cancelled: list[int] = field(default_factory=list)
    dies: bool = False

    def init(self, **options: Any) -> None:
        self.begun = options

    def remote(self, *, num_cpus: int) -> Callable[[Any], Any]:
        assert num_cpus == 1

        def remote(*arguments: Any) -> int:
            self.handed_out += 1
            self.tasks[self.handed_out] = pickle.dumps(arguments)
            self.most = max(self.most, len(self.tasks))
            return self.handed_out

        def wrapped(function: Any) -> Any:
            self.function = pickle.dumps(function)
            return types.SimpleNamespace(remote=remote)

        return wrapped

    def wait(self, references: Sequence[int], *, num_returns: int) -> tuple[list[int], list[int]]:
        assert self.begun
        assert set(references) == set(self.tasks)
        return list(references[-num_returns:]), list(references[:-num_returns])

    def get(self, reference: int) -> Any:
        arguments = pickle.loads(self.tasks.pop(reference))
        if self.dies:
            raise RayError("the worker died")
        try:
            return pickle.loads(self.function)(*arguments)
        except ValueError as error:
            raise RayTaskError(str(error)) from error

    def cancel(self, reference: int) -> None:
        self.cancelled.append(reference)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    stand_in = Ray()
    module = types.ModuleType("ray")
    for name in ("init", "remote", "wait", "get", "cancel"):
        setattr(module, name, getattr(stand_in, name))
    errors = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
    module.exceptions = errors  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", module)
    return stand_in


def answer(setting: Setting, trial: Trial) -> dict[str, Any]:
    return {"value": trial.seed + len(setting.seeds)}


def fault(setting: Setting, trial: Trial) -> dict[str, Any]:
    raise ValueError(f"seed {trial.seed}")


def trials(count: int) -> list[Trial]:
    return [Trial(entrants()[0], 1e-2, seed, "final") for seed in range(count)]


def test_every_trial_is_carried_out_once_and_so_many_at_a_time(ray: Ray) -> None:
    given = trials(7)
    found = list(Workers(3, "ray", answer).results(setting(), given))
    assert [trial.seed for trial, _ in found] == [2, 3, 4, 5, 6, 1, 0], "as they finish"
    assert all(result == {"value": trial.seed + 3} for trial, result in found)
    assert (ray.most, ray.tasks, ray.cancelled) == (3, {}, [])
    assert ray.begun["ignore_reinit_error"]


def test_who_stops_early_leaves_nothing_running(ray: Ray) -> None:
    results = Workers(3, "ray", answer).results(setting(), trials(7))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert sorted(ray.cancelled) == sorted(ray.tasks)
    assert len(ray.cancelled) == 2


def test_a_worker_that_dies_is_told_from_a_trial_that_raises(ray: Ray) -> None:
    with pytest.raises(RayTaskError, match="seed"):
        list(Workers(2, "ray", fault).results(setting(), trials(3)))
    ray.tasks.clear()
    ray.dies = True
    with pytest.raises(TrainError, match="worker process died") as error:
        list(Workers(2, "ray", answer).results(setting(), trials(3)))
    assert "run table" in str(error.value)
