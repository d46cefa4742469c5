"""Runs in two joined processes (gloo), stopped by the death of either and started anew.

The test is the agent, as torchrun is: once one process has died it ends the other, which may
wait for the dead one forever, at once or after a moment in which it can meet the broken
connection; then it starts both again. Every rank has its own log, and all have to be equal to
the unbroken run in two processes.
"""

from __future__ import annotations

import mmap
import os
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from sidepath.training import state
from sidepath.training.processes import Processes
from sidepath.training.run import Run, Step
from tests.faults import KILLED, started
from tests.training.killing import (
    PACKED,
    PLAIN,
    STEPS,
    Outcome,
    Row,
    count,
    data_of,
    play,
    read,
    run_folder,
)

RANKS = (0, 1)
LOGS = ("log", "log-1")
LIMIT = 60
"""Seconds that a start may take."""
VICTIMS = ((0,), (1,), (0, 1))
DELAYS = (0.0, 0.1)
"""Seconds from a death to the other's end."""
AFTER, BACKWARD, SAVED = (
    "after each step",
    "in each step, before the gradients are added",
    "in each step, the checkpoint being saved",
)
PLACES = (AFTER, BACKWARD, SAVED)
Die = Callable[[], None]
_exit = os._exit


def start(folder: Path, work: Callable[[int], object]) -> list[int]:
    """Fork both ranks, let them meet and `work(rank)`; their process ids."""
    meeting = folder / f"meeting-{secrets.token_hex(4)}"
    return [started(partial(_joined, folder, meeting, rank, work)) for rank in RANKS]


def _joined(folder: Path, meeting: Path, rank: int, work: Callable[[int], object]) -> None:
    errors = os.open(folder / f"errors-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=len(RANKS),
        timeout=timedelta(seconds=LIMIT),
    )
    work(rank)


def ended_both(children: Sequence[int], delay: float = 0.0) -> list[int]:
    """Wait for both; their exit codes, negative for the signal that ended one.

    `delay` seconds after one has failed the other is killed. Errors: `TimeoutError`.
    """
    codes: dict[int, int] = {}
    last = time.monotonic() + LIMIT
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(found[1])
                if codes[child] != 0:
                    last = min(last, time.monotonic() + delay)
        if time.monotonic() >= last:
            hung = not any(codes.values())
            for child in [child for child in children if child not in codes]:
                os.kill(child, signal.SIGKILL)
                codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if hung:
                raise TimeoutError(f"two processes did not end within {LIMIT} s")
        time.sleep(0.001)
    return [codes[child] for child in children]


def require_ends(row: Row, folder: Path, codes: Sequence[int], what: str) -> None:
    """Whoever was not killed came to the end, or met the broken connection."""
    for rank, code in enumerate(codes):
        if code in (0, KILLED, -signal.SIGKILL, -signal.SIGTERM):
            continue
        said = (folder / f"errors-{rank}").read_text().strip()
        if code != 1 or "gloo" not in said.splitlines()[-1].lower():
            row.exceptions.append(f"{what}: rank {rank} ended with code {code}: {said[-300:]}")


@cache
def unbroken_pair(setting: str) -> Outcome:
    """The run in two processes that nothing stops; both agree on it."""
    data_of(setting)
    with run_folder() as folder:
        codes = ended_both(
            start(folder, lambda rank: play(setting, folder, log=LOGS[rank])), DELAYS[1]
        )
        assert codes == [0, 0], (folder / "errors-0").read_text()
        one, other = (read(folder, log) for log in LOGS)
    assert sorted(one.losses) == list(range(1, STEPS + 1))
    assert one == other
    return one


def finish_pair(row: Row, folder: Path, *, every: int = 1) -> None:
    """As `killing.finish`, in two processes."""
    children = start(folder, lambda rank: play(row.setting, folder, log=LOGS[rank], every=every))
    codes = ended_both(children, DELAYS[1])
    if codes != [0, 0]:
        said = "; ".join((folder / f"errors-{rank}").read_text()[-300:] for rank in RANKS)
        row.exceptions.append(f"a resumed run ended with codes {codes}: {said}")
        return
    outcomes = [read(folder, log) for log in LOGS]
    count(row, folder, outcomes, unbroken_pair(row.setting), every=every)


def each_step(
    place: str = AFTER, setting: str = PLAIN, steps: Iterable[int] = range(1, STEPS + 1)
) -> Row:
    """Rank 0, rank 1 or both die at a place of step k, for each k; by exit and by SIGKILL."""
    row = Row(f"2 processes, rank 0, 1 or both killed {place}", setting)
    unbroken_pair(setting)
    for number, step in enumerate(steps):
        victims = VICTIMS[number % len(VICTIMS)]
        delay = DELAYS[number // len(VICTIMS) % len(DELAYS)]
        with run_folder() as folder:
            children = start(folder, partial(_doomed, row.setting, folder, place, step, victims))
            codes = ended_both(children, delay)
            died = [codes[rank] in (KILLED, -signal.SIGKILL) for rank in victims]
            row.kills += all(died)
            if not all(died):
                row.exceptions.append(f"step {step}: nobody died, codes {codes}")
            require_ends(row, folder, codes, f"step {step}")
            finish_pair(row, folder)
    return row


def _doomed(
    setting: str, folder: Path, place: str, step: int, victims: Sequence[int], rank: int
) -> None:
    """A run that ends its own process at a place of a step, where its rank is a victim."""

    def die() -> None:
        if step % 2:
            _exit(KILLED)
        os.kill(os.getpid(), signal.SIGKILL)

    def at_step(number: int) -> None:
        if place == AFTER and number == step and rank in victims:
            die()

    if rank in victims and place == BACKWARD:
        _die_after_backward(step, die)
    if rank in victims and place == SAVED:
        _die_in_save(step, die)
    play(setting, folder, at_step=at_step, log=LOGS[rank])


def _die_after_backward(step: int, die: Die) -> None:
    backward = Run.backward

    def dying(run: Run, under_way: Step) -> list[Tensor]:
        losses = backward(run, under_way)
        if run.step + 1 == step:
            die()
        return losses

    Run.backward = dying  # type: ignore[method-assign, assignment]


def _die_in_save(step: int, die: Die) -> None:
    """Rank 0 dies when its checkpoint is on the disk, rank 1 as soon as it waits for that."""
    save, wait, saving = state.save, Processes.wait, []

    def marked(run: Run) -> Path:
        saving.append(run.step)
        return save(run)

    def dying(processes: Processes) -> None:
        if saving and saving[-1] == step:
            die()
        wait(processes)

    state.save = marked  # type: ignore[assignment]
    Processes.wait = dying  # type: ignore[method-assign, assignment]


def at_random(kills: int, setting: str = PLAIN, *, seed: int = 0) -> Row:
    """SIGKILLs of a random rank at random moments, until `kills` have struck."""
    row = Row("2 processes, SIGKILL of a random rank at random moments", setting)
    generator = random.Random(seed)
    seconds = seconds_of_pair(setting)
    with mmap.mmap(-1, len(RANKS)) as phase:
        while row.kills < kills and not row.exceptions:
            with run_folder() as folder:
                alive = True
                while alive and row.kills < kills:
                    alive = _strike(row, folder, generator, seconds, phase)
                finish_pair(row, folder)
    return row


def seconds_of_pair(setting: str) -> float:
    """Of an unbroken run."""
    unbroken_pair(setting)
    with run_folder() as folder:
        began = time.perf_counter()
        ended_both(start(folder, lambda rank: play(setting, folder, log=LOGS[rank])))
        return time.perf_counter() - began


def _strike(
    row: Row, folder: Path, generator: random.Random, seconds: float, phase: mmap.mmap
) -> bool:
    """Start a run and kill a rank some time later; False when it had come to its end."""
    phase[:] = bytes(len(RANKS))
    victim = generator.choice(RANKS)
    children = start(folder, partial(_marked, row.setting, folder, phase))
    time.sleep(generator.uniform(0, 0.7 * seconds))
    os.kill(children[victim], signal.SIGKILL)
    codes = ended_both(children, generator.choice(DELAYS))
    require_ends(row, folder, codes, "at random")
    if codes[victim] == -signal.SIGKILL:
        row.kills += 1
        name = f"rank {victim} {'running' if phase[victim] else 'starting'}"
        row.places[name] = row.places.get(name, 0) + 1
    return codes[victim] == -signal.SIGKILL


def _marked(setting: str, folder: Path, phase: mmap.mmap, rank: int) -> None:
    play(setting, folder, log=LOGS[rank], begun=lambda _: phase.__setitem__(rank, 1))


def quick() -> list[Row]:
    """Every kind, thinned out."""
    return [
        each_step(AFTER, steps=(20,)),
        each_step(BACKWARD, steps=(9, 1)),
        each_step(SAVED, PACKED, steps=(4, 15)),
        at_random(2),
    ]


def whole(kills: int, setting: str) -> Iterator[Row]:
    """Every kind, at every place."""
    for place in PLACES:
        yield each_step(place, setting)
    yield at_random(kills, setting)
