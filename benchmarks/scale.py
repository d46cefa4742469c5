"""Thousands of adapters behind one base, in simulated time: who should leave the model, how many
should run at once, and what is served a second.

    python benchmarks/scale.py measure                    # this machine: coefficients, and a check
    python benchmarks/scale.py plan [--requests 20000]   # a GPU on paper
    python benchmarks/scale.py large                      # 10,000 adapters, 1,000,000 requests

The scheduler is the engine's own; a step takes `step + row x rows + token x tokens + adapter x
adapters` seconds. `measure` times steps of the engine over a random Llama of 29M parameters, fits
the coefficients, and holds the simulation against a load that they were not fitted on. `plan` and
`large` take them from data sheets: nothing of them is measured.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine, markdown, show
from benchmarks.serving import copies, llama, prompts_of

from sidepath.serve.engine import Engine
from sidepath.serve.requests import Request
from sidepath.serve.residence import POLICIES, Shelf
from sidepath.serve.scheduler import Batch, Limits, Scheduler
from sidepath.serve.simulation import Arrival, Costs, Simulated, simulate

PROMPT, ANSWER = 128, 32
"""Tokens of a prompt, and of an answer on average."""


@dataclass(frozen=True)
class OnPaper:
    """A GPU, a base and adapters in numbers of their makers."""

    parameters: float = 8e9
    """Of the base, in bfloat16."""
    memory_bandwidth: float = 3.35e12
    """Bytes a second."""
    arithmetic: float = 0.4 * 989e12
    """Operations a second, at 40 % of the data sheet's."""
    cache_bytes: float = 131_072.0
    """Keys and values of one token (32 layers, 8 heads of 128, bfloat16)."""
    adapter_bytes: float = 84e6
    """Rank 16 on all linear layers, bfloat16."""
    link: float = 25e9
    """Bytes a second from host memory; a disk: 3e9."""
    launch: float = 1e-3
    """Seconds of a step beside the bytes: launching, sampling, Python."""
    placing: float = 5e-3
    """Seconds to check and place an adapter beside its bytes."""

    def costs(self) -> Costs:
        """Each step reads the base; each row its cache; each adapter its factors."""
        context = PROMPT + ANSWER / 2
        return Costs(
            step=self.launch + 2 * self.parameters / self.memory_bandwidth,
            row=context * self.cache_bytes / self.memory_bandwidth,
            token=2 * self.parameters / self.arithmetic,
            adapter=self.adapter_bytes / self.memory_bandwidth,
        )

    def gigabytes(self, resident: int, limits: Limits) -> dict[str, float]:
        """What has to have room: the base, keys and values of the running, the adapters."""
        return {
            "base": 2 * self.parameters / 1e9,
            "cache": limits.cached_tokens * self.cache_bytes / 1e9,
            "adapters": resident * self.adapter_bytes / 1e9,
        }

    def seconds(self, link: float) -> float:
        """From asking for an adapter until it answers."""
        return self.placing + self.adapter_bytes / link


def zipf(adapters: int, exponent: float, rng: random.Random) -> Iterator[str]:
    """Names without end, the k-th most popular as often as `k ** -exponent`."""
    weights = [rank**-exponent for rank in range(1, adapters + 1)]
    edges = list(itertools.accumulate(weights))
    names = [f"adapter-{number}" for number in range(adapters)]
    while True:
        yield from rng.choices(names, cum_weights=edges, k=10_000)


def load(
    requests: int, adapters: int, rate: float, *, exponent: float = 1.0, seed: int = 0
) -> list[Arrival]:
    """Requests at random times, `rate` a second; answers of 1 to 63 tokens, 32 on average."""
    rng = random.Random(seed)
    names, now, found = zipf(adapters, exponent, rng), 0.0, []
    for _ in range(requests):
        now += rng.expovariate(rate)
        found.append(Arrival(now, next(names), PROMPT, rng.randint(1, 2 * ANSWER - 1)))
    return found


def told(found: Simulated, requests: int) -> list[str]:
    """Hits, what was served a second, and how long the first token took."""
    first = sorted(found.first_token)
    served = requests - found.turned_away
    return [
        f"{found.hits / served:.3f}",
        f"{found.requests_per_second:,.1f}",
        f"{1000 * first[served // 2]:,.0f}",
        f"{1000 * first[min(served - 1, int(served * 0.99))]:,.0f}",
        f"{found.turned_away / requests:.3f}",
    ]


HEAD = ["hits", "requests/s", "first token, median ms", "99 % below", "turned away"]
LIMITS = Limits(rows=256, slots=128, context=2048, cached_tokens=65_536, step_tokens=1024,
                queue=512)  # fmt: skip


def plan(options: argparse.Namespace) -> None:
    """Tables: policies and room; slots; number of adapters and where they come from."""
    paper, requests, many = OnPaper(), options.requests, options.adapters
    costs, host = paper.costs(), paper.seconds(paper.link)

    def row(adapters: int, limits: Limits, shelf: Shelf | None, rate: float) -> list[str]:
        arrivals = load(requests, adapters, rate)
        return told(simulate(limits, costs, arrivals, shelf), requests)

    policies = [
        [policy, str(resident), *row(many, LIMITS, Shelf(resident, host, 4, policy), options.rate)]
        for resident in (64, 256, 512)
        for policy in POLICIES
    ]
    slots = [
        [
            str(count),
            *row(many, Limits(**{**vars(LIMITS), "slots": count}), Shelf(256, host), options.rate),
        ]
        for count in (8, 16, 32, 64, 128, 256)
    ]
    sources = {"always there": None, "host, 25 GB/s": host, "disk, 3 GB/s": paper.seconds(3e9)}
    numbers = [
        [
            str(adapters),
            source,
            *row(adapters, LIMITS, None if s is None else Shelf(256, s), options.crowd),
        ]
        for adapters in (1, 100, 1_000, 10_000)
        for source, s in sources.items()
    ]
    show(
        {"costs": vars(costs), "policies": policies, "slots": slots, "adapters": numbers},
        f"{requests:,} requests over {many:,} adapters (Zipf 1.0), {options.rate:g} a second",
        markdown(["who leaves", "resident", *HEAD], policies),
        "256 resident, the longest unused leaves",
        markdown(["slots", *HEAD], slots),
        f"{options.crowd:g} requests a second, more than can be served; 256 resident",
        markdown(["adapters", "from", *HEAD], numbers),
    )


def large(options: argparse.Namespace) -> None:
    """The largest load, with what was chosen."""
    paper = OnPaper()
    shelf = Shelf(options.resident, paper.seconds(paper.link))
    began = time.perf_counter()
    arrivals = load(options.requests, options.adapters, options.rate)
    found = simulate(LIMITS, paper.costs(), arrivals, shelf)
    document = {
        "requests": options.requests,
        "adapters": options.adapters,
        "resident": options.resident,
        "hits": found.hits / options.requests,
        "loads": found.loads,
        "steps": found.steps,
        "gigabytes": paper.gigabytes(options.resident, LIMITS),
        "simulated_seconds": found.seconds,
        "real_seconds": time.perf_counter() - began,
        "turned_away": found.turned_away,
    }
    show(document, markdown(HEAD, [told(found, options.requests)]))


def measure(options: argparse.Namespace) -> None:
    """Fit the coefficients on this machine, and hold the simulation against another load."""
    torch.set_num_threads(options.threads)
    limits = Limits(rows=12, slots=12, context=256, step_tokens=96)
    with tempfile.TemporaryDirectory() as place:
        engine = Engine(llama(), limits=limits)
        names = [folder.name for folder in copies(Path(place), 12, 12)]
        for name in names:
            engine.adapters.load(name, Path(place, name))
        run(engine, some(24, names, seed=1))  # everything is warm from now on
        seen = [step for seed in range(2, 6) for step in run(engine, some(24, names, seed))]
        costs = fitted(seen)
        arrivals = some(64, names, seed=9)
        measured = sum(seconds for _, seconds in run(engine, arrivals))
    predicted = simulate(limits, costs, arrivals)
    errors = [abs(costs.seconds(batch) / seconds - 1) for batch, seconds in seen]
    document = {
        "costs": vars(costs),
        "steps": len(seen),
        "median_error_of_a_step": statistics.median(errors),
        "measured_seconds": measured,
        "predicted_seconds": predicted.seconds,
        "ratio": predicted.seconds / measured,
        "machine": machine(),
    }
    cells = [[f"{value:.3g}" for value in vars(costs).values()]]
    show(document, machine(), markdown([f"{name}, s" for name in vars(costs)], cells))


def some(count: int, names: Sequence[str], seed: int) -> list[Arrival]:
    """Requests that all come at once, some of them to the base."""
    rng = random.Random(seed)
    return [
        Arrival(0.0, rng.choice([None, *names]), rng.randint(8, 160), rng.randint(1, 32))
        for _ in range(count)
    ]


def run(engine: Any, arrivals: Sequence[Arrival]) -> list[tuple[Batch, float]]:
    """Answer them all; each step's batch and seconds."""
    batches: list[Batch] = []
    batch_of = Scheduler.batch

    def remembered(scheduler: Scheduler) -> Batch | None:
        found = batch_of(scheduler)
        if found is not None:
            batches.append(found)
        return found

    seconds = []
    with patch.object(Scheduler, "batch", remembered):
        for each, prompt in zip(arrivals, prompts_of([a.prompt for a in arrivals]), strict=True):
            engine.submit(Request(prompt, each.adapter, each.answer))
        while True:
            began = time.perf_counter()
            if not engine.step():
                break
            seconds.append(time.perf_counter() - began)
    return list(zip(batches, seconds, strict=True))


def fitted(seen: Sequence[tuple[Batch, float]]) -> Costs:
    """The coefficients of least squares, none of them negative."""
    from scipy.optimize import nnls

    rows = [
        [1, len(batch.rows), batch.tokens, len({row.adapter for row in batch.rows} - {None})]
        for batch, _ in seen
    ]
    found, _ = nnls(np.array(rows, dtype=float), np.array([seconds for _, seconds in seen]))
    return Costs(*map(float, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    ways = parser.add_subparsers(required=True)
    measuring = ways.add_parser("measure")
    measuring.add_argument("--threads", type=int, default=2)
    measuring.set_defaults(way=measure)
    planning = ways.add_parser("plan")
    planning.set_defaults(way=plan, requests=20_000)
    planning.add_argument("--crowd", type=float, default=500.0)
    largest = ways.add_parser("large")
    largest.set_defaults(way=large, requests=1_000_000)
    largest.add_argument("--resident", type=int, default=512)
    for one in (planning, largest):
        one.add_argument("--requests", type=int)
        one.add_argument("--adapters", type=int, default=10_000)
        one.add_argument("--rate", type=float, default=120.0)
    options = parser.parse_args()
    options.way(options)


if __name__ == "__main__":
    main()
