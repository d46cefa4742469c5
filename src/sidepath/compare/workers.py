"""Trials one after another, or side by side in processes of this machine or of a Ray cluster."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal

from sidepath.compare.setting import Setting, Trial
from sidepath.compare.trial import run_trial
from sidepath.errors import MissingExtra, TrainError

Through = Literal["processes", "ray"]
Result = dict[str, Any]
Run = Callable[[Setting, Trial], Result]


@dataclass(frozen=True)
class Workers:
    """How trials are carried out: so many at once, through what."""

    count: int = 1
    through: Through = "processes"
    run: Run = run_trial
    """What carries out one trial; a function that a process can import."""

    def results(self, setting: Setting, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Result]]:
        """Each trial with its result, as they finish; those not begun are dropped when the
        caller stops.

        Raises:
            MissingExtra: Ray is asked for and not installed.
            TrainError: a worker process died (killed, or out of memory).
        """
        if self.through == "ray":
            yield from _through_ray(self.run, setting, trials, self.count)
        elif self.count == 1 or len(trials) < 2:
            for trial in trials:
                yield trial, self.run(setting, trial)
        else:
            yield from _in_processes(self.run, setting, trials, self.count)


def _in_processes(
    run: Run, setting: Setting, trials: Sequence[Trial], count: int
) -> Iterator[tuple[Trial, Result]]:
    # Forking a process that has used torch's threads can hang; a spawned one starts afresh.
    pool = ProcessPoolExecutor(
        min(count, len(trials)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_share_cores,
        initargs=(count,),
    )
    try:
        running = {pool.submit(run, setting, trial): trial for trial in trials}
        for done in as_completed(running):
            yield running[done], done.result()
    except BrokenProcessPool as error:
        raise _died() from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _share_cores(count: int) -> None:
    """Runs in each worker: its share of the machine's threads, and a quiet transformers."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _through_ray(
    run: Run, setting: Setting, trials: Sequence[Trial], count: int
) -> Iterator[tuple[Trial, Result]]:
    """At most `count` tasks at once, each with one of the cluster's CPUs."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise MissingExtra(
            "--through ray needs Ray, which is not installed",
            hint="pip install 'sidepath[scale]', or leave the flag out: worker processes of this "
            "machine need nothing more",
        ) from error
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    remote = ray.remote(num_cpus=1)(run)
    waiting = list(trials)
    running: dict[Any, Trial] = {}
    try:
        while waiting or running:
            while waiting and len(running) < count:
                trial = waiting.pop(0)
                running[remote.remote(setting, trial)] = trial
            finished, _ = ray.wait(list(running), num_returns=1)
            for reference in finished:
                result = ray.get(reference)
                yield running.pop(reference), result
    except ray.exceptions.RayTaskError:  # what the trial itself raised
        raise
    except ray.exceptions.RayError as error:
        raise _died() from error
    finally:
        for reference in running:
            ray.cancel(reference)


def _died() -> TrainError:
    return TrainError(
        "a worker process died",
        hint="what was finished is in the run table: the same command goes on from there; "
        "if memory was short, give fewer --workers",
    )
