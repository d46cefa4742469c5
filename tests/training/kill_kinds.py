"""The ways to stop a run, each giving one row of the kill table.

A start that is killed before its first step ends cannot say that it resumed: `Row.resumes`
counts those that did.

python -m tests.training.kill_kinds quick     the rows of the quick tests, as JSON
"""

from __future__ import annotations

import dataclasses
import errno
import json
import mmap
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from sidepath.errors import WriteFailed
from sidepath.training import checkpoint as checkpoints
from tests.faults import KILLED, Faults, ended, forked, started
from tests.training.killing import (
    PHASES,
    PLAIN,
    STEPS,
    Log,
    Row,
    finish,
    play,
    run_folder,
    unbroken,
)

_exit = os._exit
SERIES = ([1, 2], [3, 8], [19, 20], [1, 2, 3], [2, 9, 17], [5, 5], [20, 20, 20])
"""Steps after which a run is killed, one start after the other."""
FAILED = 3
"""Exit code of a child whose run ended with `WriteFailed`."""
SMALL = 6_000
"""Bytes: more than any checkpoint.json, less than any tensors.safetensors of these runs."""


def each_step(setting: str = PLAIN, steps: Iterable[int] = range(1, STEPS + 1)) -> Row:
    """`os._exit` after step k, for each k."""
    row = Row("os._exit after each step", setting)
    for step in steps:
        _killed_at(row, [step])
    return row


def in_a_row(setting: str = PLAIN, series: Iterable[Iterable[int]] = SERIES) -> Row:
    """Killed twice and thrice before the end; also twice after the same step."""
    row = Row("twice and thrice in a row", setting)
    for steps in series:
        _killed_at(row, steps)
    return row


def _killed_at(row: Row, steps: Iterable[int]) -> None:
    with run_folder() as folder:
        for step in steps:
            code = forked(partial(play, row.setting, folder, at_step=_exit_at(step)))
            if code == KILLED:
                row.kills += 1
            elif code != 0:  # 0: the run was already past that step, and ended
                row.exceptions.append(f"step {step}: code {code}")
        finish(row, folder)


def _exit_at(step: int) -> Callable[[int], None]:
    return lambda number: _exit(KILLED) if number == step else None


def each_operation(
    mode: str, setting: str = PLAIN, *, step: int = 7, every: int = 1, first: int = 1
) -> Row:
    """The n-th file operation of the checkpoint after `step` fails, or is the process's last.

    `mode` is "kill" or the name of an errno; n goes up to a save that none of it reached.
    """
    kind = "killed at" if mode == "kill" else f"{mode} at"
    row = Row(f"{kind} each file operation of a save", setting)
    number = first
    while True:
        with run_folder() as folder:
            reached = _operation(row, folder, mode, number, step)
            if not reached:
                return row
            row.kills += 1
            finish(row, folder)
        number += every


def _operation(row: Row, folder: Path, mode: str, number: int, step: int) -> bool:
    """One run with a fault; whether the fault was reached."""
    error = errno.EIO if mode == "kill" else getattr(errno, mode)
    under = folder / "checkpoints"
    faults = Faults(number, under=under, kill=mode == "kill", error=error)

    def at_step(reached: int) -> None:
        if reached == step - 1:
            faults.__enter__()
        elif reached == step:
            faults.__exit__()

    def action() -> None:
        try:
            play(row.setting, folder, at_step=at_step)
        except WriteFailed:
            faults.__exit__()
            _exit(FAILED)
        if faults.hit:
            Log(folder / "log").say(hit=faults.names[number - 1])

    code = forked(action)
    if code not in (0, FAILED, KILLED):
        row.exceptions.append(f"operation {number}: code {code}")
    return code != 0 or bool(Log(folder / "log").facts("hit"))


def in_rust(mode: str, setting: str = PLAIN, steps: Iterable[int] = range(1, STEPS)) -> Row:
    """From step k on the kernel lets no file grow beyond `SMALL` bytes: safetensors' real system
    call fails ("error", EFBIG), or the kernel kills the process within it ("kill", SIGXFSZ).
    """
    said = "EFBIG in" if mode == "error" else "killed (SIGXFSZ) in"
    row = Row(f"{said} safetensors' own system call", setting)
    expected = FAILED if mode == "error" else -signal.SIGXFSZ
    for step in steps:
        with run_folder() as folder:
            code = forked(partial(_limited, row, folder, step, mode))
            row.kills += code == expected
            if code != expected:
                row.exceptions.append(f"step {step}: code {code}")
            finish(row, folder)
    return row


def _limited(row: Row, folder: Path, step: int, mode: str) -> None:
    def at_step(reached: int) -> None:
        if reached == step:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if mode == "kill":
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL))

    try:
        play(row.setting, folder, at_step=at_step)
    except WriteFailed:
        _exit(FAILED)


def at_random(kills: int, setting: str = PLAIN, *, seed: int = 0) -> Row:
    """SIGKILLs at random moments of start-up, step and save, until `kills` have struck.

    A run that reaches its end is compared, and the next one begins. Which piece of work was hit
    is read from a byte of shared memory that the child keeps.
    """
    row = Row("SIGKILL at random moments", setting)
    generator = random.Random(seed)
    unbroken(setting)
    seconds = seconds_of(setting)
    with mmap.mmap(-1, 1) as phase:
        while row.kills < kills:
            with run_folder() as folder:
                alive = True
                while alive and row.kills < kills:
                    phase[0] = 0
                    alive = _strike(row, folder, generator.uniform(0, seconds / 2), phase)
                finish(row, folder)
    return row


def seconds_of(setting: str) -> float:
    """Of an unbroken run."""
    with run_folder() as folder:
        began = time.perf_counter()
        forked(lambda: play(setting, folder))
        return time.perf_counter() - began


def _strike(row: Row, folder: Path, delay: float, phase: mmap.mmap) -> bool:
    """Start a run and kill it after `delay` seconds; False when it had come to its end."""
    child = started(lambda: _marked(row.setting, folder, phase))
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    code = ended(child)
    if code == -signal.SIGKILL:
        row.kills += 1
        name = PHASES[phase[0]]
        row.places[name] = row.places.get(name, 0) + 1
    elif code != 0:
        row.exceptions.append(f"a run that was not killed ended with code {code}")
    return code == -signal.SIGKILL


def _marked(setting: str, folder: Path, phase: mmap.mmap) -> None:
    """A run that says in `phase` what it is doing."""
    save = checkpoints.save

    def marked(*args: object, **kwargs: object) -> Path:
        phase[0] = 2
        try:
            return save(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            phase[0] = 1

    checkpoints.save = marked  # type: ignore[assignment]
    play(setting, folder, begun=lambda _: phase.__setitem__(0, 1))


def quick() -> list[Row]:
    """Every kind, thinned out."""
    return [
        each_step(steps=(1, 10, 20)),
        in_a_row(series=([5, 5], [2, 9, 17])),
        each_operation("kill", every=9, first=2),
        each_operation("ENOSPC", every=18, first=1),
        in_rust("error", steps=(3,)),
        in_rust("kill", steps=(9,)),
        at_random(5),
    ]


def whole(kills: int, setting: str) -> Iterator[Row]:
    """Every kind, at every place."""
    yield each_step(setting)
    yield in_a_row(setting)
    for mode in ("kill", "ENOSPC", "EIO"):
        yield each_operation(mode, setting)
    yield in_rust("error", setting)
    yield in_rust("kill", setting)
    yield at_random(kills, setting)


if __name__ == "__main__":
    assert sys.argv[1:] == ["quick"], __doc__
    print(json.dumps([dataclasses.asdict(row) for row in quick()]))
