"""The fuzz of every reader, in one process of its own: `python -m tests.fuzz.run --count 20000`.

A case is right when the reader refuses with one error of ours, or understands exactly what the file
says. It is wrong when anything else is raised, when something else is understood, when memory grows
by more than `MEMORY` (a limit on the address space, which memory maps of files count against too),
when it hangs, or when reading opens a file to write, starts a program, unpickles, or connects.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidepath.errors import SidepathError
from tests.fuzz.mutate import Draft, mutate
from tests.fuzz.reader import Reader
from tests.fuzz.readers import READERS

MEMORY = 512 * 2**20
HANGS = 60
"""Seconds after which a case counts as hanging; the machine may be busy."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
              "socket.connect", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink",
              "os.link", "os.truncate", "os.chmod", "shutil.rmtree")  # fmt: skip


@dataclass
class Outcome:
    """What the cases of one reader came to."""

    refused: int = 0
    accepted: int = 0
    seconds: float = 0.0
    """Of the processor, in reading."""
    slowest: float = 0.0
    slowest_case: str = ""
    mutations: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Watch:
    """What a reader may not do, seen by an audit hook while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING and path != os.devnull:
                self.seen.append(f"opens {path!r} to write")
        elif event in _FORBIDDEN:
            self.seen.append(f"{event} {arguments[:1]!r}")


class Hanging(BaseException):
    """A case took longer than `HANGS`."""


def _alarm(*_: object) -> None:
    raise Hanging


@contextlib.contextmanager
def watched(watch: Watch, reader: Reader) -> Iterator[None]:
    watch.seen.clear()
    watch.on = not reader.writes
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.on = False


def case(reader: Reader, clean: dict[str, bytes], seed: str) -> Draft:
    """The draft of one case: one to three mutations, and perhaps digests that fit again."""
    rng = random.Random(seed)
    draft = Draft(dict(clean))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutate(rng, draft, tuple(clean), places=reader.places, sparse=reader.sparse)
    if reader.resign is not None and rng.random() < 0.7:
        files = {name: data for name, data in draft.files.items() if isinstance(data, bytes)}
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            draft.files |= reader.resign(files)
            draft.done.append("digests fit again")
    return draft


def tried(reader: Reader, folder: Path, watch: Watch) -> str | None:
    """None when the folder was refused, "" when it was understood as it is; else what is wrong."""
    try:
        with watched(watch, reader):
            found = reader.read(folder)
    except SidepathError as error:
        wrong = _refusal(error)
    except Hanging:
        return f"hangs for {HANGS} s"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"
    else:
        wrong = _compared(reader, folder, found)
    return f"it {watch.seen[0]}" if watch.seen else wrong


def _refusal(error: SidepathError) -> str | None:
    """None for a proper one; memory that could not be had is no reason to refuse."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            return f"it wants more memory than {MEMORY} bytes: {str(error)[:200]}"
        cause = cause.__cause__ or cause.__context__
    return None if str(error).strip() else "an error without a message"


def _compared(reader: Reader, folder: Path, found: Any) -> str:
    try:
        expected = reader.says(folder)
    except MemoryError:
        return ""  # it reads files whole, those of absurd sizes too
    except Exception as error:
        return f"understood, but a plain reader cannot: {type(error).__name__}: {str(error)[:200]}"
    if expected is None or found == expected:
        return ""
    return f"understood {str(found)[:300]}, the file says {str(expected)[:300]}"


def run(reader: Reader, count: int, seed: int, place: Path, watch: Watch) -> Outcome:
    """`count` cases of one reader."""
    clean = reader.files()
    outcome = Outcome()
    for number in range(-1, count):
        name = f"{seed}/{reader.name}/{number}"
        draft = Draft(dict(clean)) if number < 0 else case(reader, clean, name)
        folder = place / "target" / "a"
        folder.mkdir(parents=True)
        draft.write(folder)
        began = time.process_time()
        wrong = tried(reader, folder, watch)
        taken = time.process_time() - began
        outcome.seconds += taken
        shutil.rmtree(place / "target")
        if number < 0 and wrong != "":
            outcome.failures.append(f"{name}: the clean files are not understood: {wrong}")
            break
        outcome.mutations.update(draft.done)
        outcome.refused += wrong is None
        outcome.accepted += wrong == ""
        if taken > outcome.slowest:
            outcome.slowest, outcome.slowest_case = taken, f"{name}: {'; '.join(draft.done)}"
        if wrong:
            outcome.failures.append(f"{name}: {'; '.join(draft.done)}: {wrong}")
    return outcome


def limit_memory() -> None:
    """From here on the address space may grow by `MEMORY`."""
    used = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmSize")
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def fuzz(count: int, seed: int, only: str = "") -> dict[str, Any]:
    """About `count` cases over all readers, by their shares."""
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGALRM, _alarm)
    readers = [reader for reader in READERS if only in reader.name]
    shares = sum(reader.share for reader in readers)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "outside").mkdir()
        (place / "outside" / "secret").write_text('{"secret": 1}')
        for reader in readers:  # what they import, once, before memory is limited
            run(reader, 2, seed + 1, place, watch)
        limit_memory()
        began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = {}
        for reader in readers:
            outcome = run(reader, round(count * reader.share / shares), seed, place, watch)
            found[reader.name] = vars(outcome) | {"mutations": len(outcome.mutations)}
        outside = (place / "outside" / "secret").read_text()
        assert outside == '{"secret": 1}', "a file outside was changed"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began) * 1024
    return {"readers": found, "resident_bytes_grown": grown}


def main(arguments: Sequence[str]) -> int:
    """Print what the fuzz found as JSON; 1 when a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name contains this")
    given = parser.parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):
        found = fuzz(given.count, given.seed, given.only)
    print(json.dumps(found, indent=1))
    return int(any(reader["failures"] for reader in found["readers"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
