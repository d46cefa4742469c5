"""Run a function in several joined processes (gloo): forked, so that nothing is imported anew."""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sidepath.training.processes import Processes

SECONDS = 120


def in_processes(count: int, folder: Path, work: Callable[[Processes], Any]) -> list[Any]:
    """What `work(processes)` returns (as JSON) in each of `count` processes; its errors raise."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_child, args=(rank, count, folder, work)) for rank in range(count)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(SECONDS)
    found = []
    for rank, child in enumerate(children):
        if child.is_alive():
            child.kill()
        path = folder / f"{rank}.json"
        assert path.exists(), f"process {rank} ended with {child.exitcode} and said nothing"
        said = json.loads(path.read_text())
        assert "error" not in said, said["error"]
        found.append(said["result"])
    return found


def _child(rank: int, count: int, folder: Path, work: Callable[[Processes], Any]) -> None:
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count
        )
        said = {"result": work(Processes.of_this_run())}
    except BaseException:
        said = {"error": traceback.format_exc()}
    partial = folder / f"{rank}.part"
    partial.write_text(json.dumps(said))
    partial.rename(folder / f"{rank}.json")
    os._exit(0)
