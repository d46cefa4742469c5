"""Runs that SIGTERM asks to stop: they end with a checkpoint after the step under way.

A checkpoint is due every `EVERY` steps only, so the one the next start takes up is as a rule the
one that was made on request. SIGTERM before the handler stands kills, as any process.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from sidepath.training.loop import Training
from tests.faults import ended, started
from tests.training.kill_joined import (
    DELAYS,
    LOGS,
    RANKS,
    ended_both,
    finish_pair,
    require_ends,
    seconds_of_pair,
    start,
)
from tests.training.kill_kinds import seconds_of
from tests.training.killing import (
    DRAWN,
    PLAIN,
    Log,
    Row,
    finish,
    play,
    run_folder,
    unbroken,
)

EVERY = 7
ORPHAN_LIMIT = 30
"""Seconds after which a worker process without its run must be gone."""


def _heed(reports: Training) -> None:
    signal.signal(signal.SIGTERM, lambda *_: reports.stop())


def at_random(kills: int, setting: str = PLAIN, *, group: bool = False, seed: int = 0) -> Row:
    """SIGTERM to a run's process, or to its `group` with all its workers, at random moments."""
    row = Row(f"SIGTERM to the {'process group' if group else 'process'}", setting)
    unbroken(setting)
    strike = partial(_strike_one, row, os.killpg if group else os.kill)
    _strikes(row, kills, strike, partial(finish, every=EVERY), seconds_of(setting), seed)
    return row


def pair_at_random(kills: int, setting: str = PLAIN, *, seed: int = 0) -> Row:
    """SIGTERM to a random one of two joined processes at random moments: both end alike."""
    row = Row("2 processes, SIGTERM to a random one", setting)
    generator = random.Random(seed)
    strike = partial(_strike_pair, row, generator)
    seconds = seconds_of_pair(setting)
    _strikes(row, kills, strike, partial(finish_pair, every=EVERY), seconds, seed)
    return row


def _strikes(
    row: Row,
    kills: int,
    strike: Callable[[Path, float], bool],
    finished: Callable[[Row, Path], None],
    seconds: float,
    seed: int,
) -> None:
    """Signals until `kills` have struck; a run that ends is compared and the next one begins."""
    generator = random.Random(seed)
    while row.kills < kills and not row.exceptions:
        with run_folder() as folder:
            alive = True
            while alive and row.kills < kills:
                alive = strike(folder, generator.uniform(0, 0.7 * seconds))
            finished(row, folder)


def _strike_one(row: Row, send: Callable[[int, int], None], folder: Path, delay: float) -> bool:
    """Start a run and send SIGTERM after `delay` seconds; False when it came to its end."""
    before = len(Log(folder / LOGS[0]).facts("stopped"))
    child = started(lambda: play(row.setting, folder, begun=_heed, every=EVERY))
    os.setpgid(child, child)
    time.sleep(delay)
    send(child, signal.SIGTERM)
    code = ended(child)
    if code not in (0, -signal.SIGTERM):
        row.exceptions.append(f"ended with code {code}")
    return _counted(row, folder, [code], before)


def _strike_pair(row: Row, generator: random.Random, folder: Path, delay: float) -> bool:
    before = len(Log(folder / LOGS[0]).facts("stopped"))
    children = start(
        folder, lambda rank: play(row.setting, folder, begun=_heed, every=EVERY, log=LOGS[rank])
    )
    time.sleep(delay)
    os.kill(children[generator.choice(RANKS)], signal.SIGTERM)
    codes = ended_both(children, DELAYS[1])
    if -signal.SIGTERM not in codes and codes != [0, 0]:
        row.exceptions.append(f"ended with codes {codes}")
    require_ends(row, folder, codes, "SIGTERM")
    return _counted(row, folder, codes, before)


def _counted(row: Row, folder: Path, codes: Sequence[int], before: int) -> bool:
    """Count a signal that struck, and see that its checkpoint is there; False: came too late."""
    stops = [Log(folder / log).facts("stopped") for log in LOGS[: len(codes)]]
    stopped = any(len(found) > before for found in stops)
    killed = -signal.SIGTERM in codes
    if stopped:
        newest = max(path.name for path in (folder / "checkpoints").glob("step-*"))
        if any(found[before:] != [newest] for found in stops):
            row.exceptions.append(f"stopped at {stops}, but the newest checkpoint is {newest}")
    if stopped or killed:
        row.kills += 1
        name = "running" if stopped else "starting"
        row.places[name] = row.places.get(name, 0) + 1
    return stopped or killed


def orphans(setting: str = DRAWN, step: int = 5) -> float:
    """SIGKILL a run with worker processes; seconds until the last of its workers is gone.

    Errors: `TimeoutError` after `ORPHAN_LIMIT` seconds.
    """
    with run_folder() as folder:
        log = Log(folder / "workers")

        def at_step(number: int) -> None:
            if number == step:
                log.say(workers=[child.pid for child in multiprocessing.active_children()])
                os.kill(os.getpid(), signal.SIGKILL)

        child = started(lambda: play(setting, folder, at_step=at_step))
        assert ended(child) == -signal.SIGKILL
        began = time.monotonic()
        (workers,) = log.facts("workers")
        assert workers, "the run had workers"
        while any(map(_lives, workers)):
            if time.monotonic() - began > ORPHAN_LIMIT:
                raise TimeoutError(f"a worker outlives its run by {ORPHAN_LIMIT} s")
            time.sleep(0.05)
        return time.monotonic() - began


def _lives(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def quick() -> list[Row]:
    """Every kind, thinned out."""
    return [at_random(2), at_random(3, DRAWN, group=True), pair_at_random(2)]


def whole(kills: int, kills_of_pair: int, setting: str) -> Iterator[Row]:
    """Every kind."""
    yield at_random(kills, setting)
    yield at_random(kills, setting, group=True)
    yield pair_at_random(kills_of_pair, setting)
