"""A server under everything that clients do, for as long as told: no answer may be another's.

    python benchmarks/soak.py [--minutes 30] [--clients 64] [--swaps 0] [--seed 0]

Makes random adapters of many ranks over the embedded base, three versions of each name, and asks
`generate` what each of them says alone. Then `sidepath serve` runs in a process of its own, with
room for few adapters, and clients ask it over HTTP: whole answers and streams, several at once,
some of them left in the middle, nonsense of fifty kinds; operators reload, unload and load names
all the while. Every answer that comes whole is held against the text of the adapter and version
that was to give it, every one that was left must be the beginning of it, and no request may meet a
version older than the one loaded when it was sent, or two of them. `--swaps N` goes on until names
were reloaded N times, without pauses.

At the end everything is unloaded: nothing may wait, run or stay. The server's memory (RSS) of the
second sixth of the run is compared with that of the last. Exits 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine, markdown, show
from benchmarks.soak_callers import Asker, Caller, Operator, Place
from benchmarks.soak_checks import Checks
from benchmarks.soak_library import BASE, Library, make_library

import sidepath
from sidepath.serve.keys import Key, add_key

NAMES, VERSIONS, QUESTIONS, NEW = 12, 3, 12, 24
OPERATORS = 3
GROWTH = 1.05
"""Most that the memory may have grown."""
MINUTES_TO_JUDGE = 6.0
"""Of a shorter run, the memory is told and not judged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--swaps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        library = make_library(
            Path(folder),
            names=NAMES,
            versions=VERSIONS,
            questions=QUESTIONS,
            new=NEW,
            seed=options.seed,
        )
        print(f"{len(library.said)} texts of {NAMES} names are known", file=sys.stderr)
        with served(library, Path(folder)) as server:
            checks = Checks(library, generations(server.place))
            memory = soak(
                server.place,
                checks,
                clients=options.clients,
                minutes=options.minutes,
                swaps=options.swaps,
                pid=server.process.pid,
            )
            left = at_the_end(server.place, checks)
        server.judge(checks)
    document = report(checks, memory, left)
    sys.exit(1 if document["failed"] else 0)


class Server:
    """`sidepath serve` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], place: Place, log: Path) -> None:
        self.process, self.place, self._log = process, place, log

    def end(self) -> None:
        """Tell it to end, and wait."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=120)

    def judge(self, checks: Checks) -> None:
        """It must have ended well, and have complained of nothing."""
        said = self._log.read_text()
        if self.process.returncode != 0 or "Traceback" in said:
            checks.fault("crash or 5xx", f"exit code {self.process.returncode}: {said[-2000:]}")


@contextmanager
def served(library: Library, folder: Path) -> Iterator[Server]:
    """The server over the library, with room for five adapters on the model and five beside."""
    keys, log = folder / "keys.json", folder / "log"
    operator, tenant = (
        add_key(keys, Key(name="operator", admin=True)),
        add_key(keys, Key(name="tenant")),
    )
    room = 5 * max(p.stat().st_size for p in library.served.rglob("*.safetensors"))
    flags = (
        f"--base {sidepath.embedded_base()} --name {BASE} --adapters {library.served} --port 0"
        f" --keys {keys} --allow-loading {library.root} --context 256 --rows 16 --slots 4"
        f" --adapter-memory {room} --host-memory {room} --stall-seconds 5 --head-seconds 5"
        " --body-seconds 5 --json"
    )
    with log.open("w") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "sidepath", "serve", *flags.split()],
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    server = Server(process, Place(_port(log, process), operator, tenant), log)
    try:
        yield server
        server.end()
    finally:
        process.kill()


def _port(log: Path, process: subprocess.Popen[str]) -> int:
    while process.poll() is None:
        found = re.search(r"serving .* at http://127\.0\.0\.1:(\d+)/v1", log.read_text())
        if found is not None:
            return int(found[1])
        time.sleep(0.1)
    sys.exit(f"the server did not start: {log.read_text()}")


def generations(place: Place) -> dict[str, int]:
    """Those of the adapters that are there."""
    with closing(Caller(place, place.operator)) as caller:
        _, _, said = caller.document("GET", "/v1/models")
    return {each["id"]: each["generation"] for each in said["data"] if each["parent"] is not None}


Sample = tuple[float, float]


def soak(
    place: Place, checks: Checks, *, clients: int, minutes: float, swaps: int, pid: int
) -> list[Sample]:
    """Let everybody loose until the time is over, or, with `swaps`, these were done; returns the
    seconds and MiB of the server's memory.
    """
    ended = threading.Event()
    names = checks.library.names[len(checks.library.names) // 3 :]
    count = min(OPERATORS, len(names))
    pause = 0.0 if swaps else 0.5
    threads: list[threading.Thread] = [
        Operator(place, checks, names[number::count], ended, pause) for number in range(count)
    ]
    threads += [Asker(place, checks, number, ended) for number in range(clients)]
    for thread in threads:
        thread.start()
    began, memory = time.monotonic(), []
    while True:
        seconds = time.monotonic() - began
        memory.append((seconds, resident(pid)))
        done = checks.counts["swaps"] >= swaps if swaps else seconds >= 60 * minutes
        if done or checks.failed > 100:
            break
        if len(memory) % 60 == 0:
            counts = f"{checks.counts.total()} counts, {checks.failed} faults"
            print(f"{seconds:.0f} s: {memory[-1][1]:.0f} MiB, {counts}", file=sys.stderr)
        time.sleep(1.0 if minutes > 1 else 0.1)
    ended.set()
    for thread in threads:
        thread.join(300)
        if thread.is_alive():
            checks.fault("connection", f"{thread.name} still waits for its answer")
    checks.settle()
    return memory


def resident(pid: int) -> float:
    """MiB of memory that a process holds."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 0.0 if found is None else int(found[1]) / 1024


def at_the_end(place: Place, checks: Checks) -> dict[str, float]:
    """Unload everything, and wait until nothing is left; what is left is a fault."""
    with closing(Caller(place, place.operator)) as caller:
        for name in generations(place):
            body = {"lora_name": name}
            status, _, said = caller.document("POST", "/v1/unload_lora_adapter", body)
            if status != 200 or not said["gone"]:
                checks.fault("left over", f"{name} does not leave: {status} {said}")
        until = time.monotonic() + 60
        left = _left(caller)
        while any(left.values()) and time.monotonic() < until:
            time.sleep(0.2)
            left = _left(caller)
    for what, number in left.items():
        if number:
            checks.fault("left over", f"{what}: {number}")
    return left


def _left(caller: Caller) -> dict[str, float]:
    """What must be 0 when nobody asks and nothing is loaded."""
    _, _, text = caller.document("GET", "/metrics")
    wanted = (
        "sidepath_waiting",
        "sidepath_running",
        "sidepath_slots",
        "sidepath_adapters",
        "sidepath_adapters_resident",
        'sidepath_adapter_bytes{tier="model"}',
        'sidepath_adapter_bytes{tier="host"}',
    )
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(found[name]) for name in wanted}


def report(checks: Checks, memory: Sequence[Sample], left: dict[str, float]) -> dict[str, Any]:
    """Tables and the JSON document; says whether anything failed."""
    span = memory[-1][0]
    early, late = (
        statistics.median([m for at, m in memory if begin * span <= at <= end * span] or [0.0])
        for begin, end in ((1 / 6, 2 / 6), (5 / 6, 1))
    )
    growth = late / early if early else 0.0
    if span >= 60 * MINUTES_TO_JUDGE and growth > GROWTH:
        checks.fault("memory", f"{early:.1f} MiB became {late:.1f}")
    document = {
        "seconds": span,
        "machine": machine(),
        "counts": dict(sorted(checks.counts.items())),
        "wrong_answers": checks.counts["fault: wrong answer"],
        "memory": {"second sixth": early, "last sixth": late, "ratio": growth},
        "rss": [[round(at), round(m, 1)] for at, m in memory[:: max(1, len(memory) // 60)]],
        "left": left,
        "failed": checks.failed,
        "faults": checks.faults,
    }
    rows = [[kind, f"{count:,}"] for kind, count in sorted(checks.counts.items())]
    rows += [
        ["wrong answers", f"{checks.counts['fault: wrong answer']:,}"],
        ["RSS, MiB, second sixth", f"{early:.1f}"],
        ["RSS, MiB, last sixth", f"{late:.1f}"],
        ["ratio", f"{growth:.3f}"],
        ["seconds", f"{span:,.0f}"],
        ["failed", f"{checks.failed:,}"],
    ]
    show(document, *checks.faults, machine(), markdown(["what", "count"], rows))
    return document


if __name__ == "__main__":
    main()
