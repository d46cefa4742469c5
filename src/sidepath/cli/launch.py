"""How a command is started and stopped: by torchrun in several processes; by SIGTERM (floor 7)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sidepath.errors import ConfigError
from sidepath.training.processes import ALONE, Processes

_COUNT, _RESTARTS = "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"


@contextmanager
def joined(distributed: str, device: str) -> Iterator[Processes]:
    """Within the block this process is one of those torchrun (or `accelerate launch`) started.

    Errors: `ConfigError` when the flag and the way the command was started do not fit.
    """
    count = int(os.environ.get(_COUNT, "0"))
    if distributed == "none":
        if count > 1:
            raise ConfigError(
                f"started as one of {count} processes, but told to train in one",
                hint="add --distributed ddp (each holds the base) or fsdp (each holds a share)",
            )
        yield ALONE
        return
    if count < 1:
        raise ConfigError(
            f"--distributed {distributed} needs a launcher",
            hint="torchrun --nproc-per-node 2 -m sidepath -- train ...",
        )
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    on_gpu = device != "cpu" and torch.cuda.is_available()
    meet("nccl" if on_gpu else "gloo")
    PartialState(cpu=not on_gpu)
    try:
        yield Processes.of_this_run()
    finally:
        dist.destroy_process_group()
        PartialState._reset_state()


def meet(backend: str) -> None:
    """Start torch.distributed as `env://` would, in a part of the launcher's store that belongs to
    this attempt: torchrun keeps one store over its restarts (torch 2.13), and the addresses that
    killed processes left there make the next ones wait for them.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://"))
    prefix = "sidepath-" + os.environ.get(_RESTARTS, "0")
    own = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=count)


@contextmanager
def stopped_by_sigterm(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block SIGTERM calls `stop` instead of ending the process at once."""
    before = signal.signal(signal.SIGTERM, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def restarted() -> bool:
    """Whether torchrun started this process anew after one of its group died."""
    return int(os.environ.get(_RESTARTS, "0")) > 0
