"""Trackers: the figures of a run in TensorBoard or Weights & Biases, through accelerate.

Off unless asked for; without a name given nothing is imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sidepath.errors import ConfigError, MissingExtra, meant

TRACKERS: dict[str, tuple[tuple[str, ...], str]] = {
    "tensorboard": (("tensorboard", "tensorboardX"), "pip install 'sidepath[track]'"),
    "wandb": (("wandb",), "pip install wandb"),
}
"""Each tracker with the packages that will do for it, and how to get one."""
PROJECT = "sidepath"
"""Of Weights & Biases, where WANDB_PROJECT names none."""


class Tracking:
    """Where a run's figures go; on every process but the first, and without trackers, nowhere."""

    def __init__(self, trackers: Sequence[Any]) -> None:
        self._trackers = trackers

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Record the figures of optimiser step `step`; those that are None are left out."""
        known = {name: float(value) for name, value in values.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(known, step=step)


@contextmanager
def trackers(
    names: Sequence[str],
    folder: str | os.PathLike[str],
    run_name: str,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Tracking]:
    """Within the block `log(values, step)` writes to the trackers named; closed at its end.

    TensorBoard writes under `folder / run_name`; Weights & Biases into the project `sidepath`
    (or WANDB_PROJECT) as run `run_name`, its own files under `folder`, online or not as its
    environment says. `settings` (a flat or nested mapping) are recorded with the run. Only the
    first process of a run logs; all of them enter the block. Without names nothing is imported
    or written.

    Raises:
        ConfigError: an unknown tracker.
        MissingExtra: a tracker's package is not installed.
    """
    _require(names)
    if not names or not _first_process():
        yield Tracking(())
        return
    started: list[Any] = []
    try:
        for name in dict.fromkeys(names):
            tracker = _tracker(name, Path(folder), run_name)
            tracker.start()
            started.append(tracker)
            if settings:
                _record(name, tracker, settings)
        yield Tracking(started)
    finally:
        for tracker in started:
            tracker.finish()


def _require(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ConfigError(
            "no such tracker",
            found=", ".join(unknown),
            expected=", ".join(TRACKERS),
            hint=meant(unknown[0], TRACKERS),
        )
    missing = {name: TRACKERS[name] for name in names if not _installed(TRACKERS[name][0])}
    if missing:
        raise MissingExtra(
            "a tracker's package is not installed",
            faults=[f"{name} needs {packages[0]}" for name, (packages, _) in missing.items()],
            hint="; ".join(install for _, install in missing.values()),
        )


def _installed(packages: Sequence[str]) -> bool:
    return any(importlib.util.find_spec(package) is not None for package in packages)


def _first_process() -> bool:
    # accelerate's trackers ask this state; it takes up a process group that is there already.
    from accelerate.state import PartialState

    return bool(PartialState().is_main_process)


def _tracker(name: str, folder: Path, run_name: str) -> Any:
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    folder.mkdir(parents=True, exist_ok=True)
    if name == "tensorboard":
        return TensorBoardTracker(run_name, logging_dir=folder)
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return WandBTracker(project, name=run_name, dir=str(folder))


def _record(name: str, tracker: Any, settings: Mapping[str, Any]) -> None:
    if name == "tensorboard":
        # As text: TensorBoard's own form would open a second run in the list for the settings.
        lines = [f"| {key} | {value} |" for key, value in _flat(settings).items()]
        text = "\n".join(["| setting | value |", "| --- | --- |", *lines])
        tracker.tracker.add_text("settings", text, global_step=0)
    else:
        tracker.store_init_configuration(dict(settings))


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[before + str(key)] = str(value)
    return flat
