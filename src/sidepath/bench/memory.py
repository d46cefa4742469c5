"""Memory of a training step: what is kept for the backward pass, and the most alive at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sidepath.bench.figure import OURS, PEER, Figure, Targets, figure_of
from sidepath.bench.models import DType, Shape
from sidepath.bench.setting import Bench
from sidepath.bench.step import FLOOR, Loss, Step, losses_of
from sidepath.store.live import LiveBytes, held_tensors
from sidepath.store.memory import switch_checkpointing
from sidepath.training.trained import device_of

Counted = Literal["saved", "peak"]
PLAIN_PEER = f"{PEER} without"
"""The peer's step without gradient checkpointing, beside those with."""
NOTES: dict[Counted, str] = {
    "saved": "tensors autograd packs for backward, each storage once; the model's own left out",
    "peak": "most bytes alive at once over the resident weights, gradients included",
}


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step's forward and backward pass, beside what is resident."""

    counted: Counted
    shape: Shape
    dtype: DType
    rows: int
    tokens: int
    targets: Targets = field(default_factory=dict)
    checkpointing: bool = False
    full: bool = True

    def __call__(self, name: str, bench: Bench) -> Figure:
        step = Step(self.shape, self.dtype, self.rows, self.tokens, full=self.full)
        losses, models = losses_of(step, bench)
        bytes_of = saved_bytes if self.counted == "saved" else peak_bytes
        samples, kept = {}, []
        if self.checkpointing and PEER in losses:
            samples[PLAIN_PEER] = [float(bytes_of(models[PEER], losses[PEER]))]
        for way, loss in losses.items():
            if self.checkpointing:
                inner: Any = models[way]
                switch_checkpointing(inner.get_base_model() if way == PEER else inner, on=True)
            samples[way] = [float(bytes_of(models[way], loss))]
            if self.counted == "saved":
                kept.append(f"{way} {alive_between(models[way], loss) / 2**20:.0f}")
        notes = [NOTES[self.counted]]
        if kept:
            # What a function keeps outside autograd's hands is seen by this count only.
            notes.append(f"all that is alive between forward and backward, MiB: {', '.join(kept)}")
        with_ = " with gradient checkpointing" if self.checkpointing else ""
        what = {"saved": "bytes saved for backward", "peak": "peak bytes over the weights"}
        return figure_of(
            name,
            f"{what[self.counted]}{with_}: {step.described(bench)}",
            samples,
            self.targets,
            unit="bytes",
            reference=FLOOR,
            notes=notes,
            also=[f"{OURS} / {PLAIN_PEER}"],
        )


def saved_bytes(model: nn.Module, loss: Loss) -> int:
    """Bytes of the distinct storages that autograd packs for the backward pass of a loss.

    Those the model holds (its weights, which are resident anyway) are left out. A tensor that a
    function keeps by other means is not seen: hold `alive_between` against it.
    """
    held = {tensor.untyped_storage()._cdata for tensor in held_tensors(model)}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            seen[storage._cdata] = storage.nbytes()
        # Detached: a graph that packs its own output would never be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = loss()
    found = sum(seen.values())
    del made
    return found


def alive_between(model: nn.Module, loss: Loss) -> int:
    """Bytes that the forward pass left alive for the backward pass, by whatever means."""
    if device_of(model).type == "cuda":
        before = torch.cuda.memory_allocated(device_of(model))
        made = loss()
        found = torch.cuda.memory_allocated(device_of(model)) - before
    else:
        with LiveBytes(held_tensors(model)) as count:
            before = count.live
            made = loss()
            found = count.live - before
    del made
    return int(found)


def peak_bytes(model: nn.Module, loss: Loss) -> int:
    """Most bytes alive at once in forward and backward beside what was resident before.

    On CUDA by the allocator's own mark; on a CPU by the storages of every operator's results
    (`LiveBytes`), which does not see buffers inside an operator.
    """
    if device_of(model).type == "cuda":
        found = _peak_on_gpu(device_of(model), lambda: _backward(loss))
    else:
        with LiveBytes(held_tensors(model)) as count:
            before = count.live
            _backward(loss)
        found = count.peak - before
    model.zero_grad(set_to_none=True)
    return found


def _peak_on_gpu(device: torch.device, run: Callable[[], None]) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    resident = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - resident)


def _backward(loss: Loss) -> None:
    loss().backward()  # type: ignore[no-untyped-call]
