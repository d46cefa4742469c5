"""The same under `torch.compile`, each compiled row beside its eager one. Compiling takes long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sidepath.bench.decode import BASE, answering, forward_of
from sidepath.bench.figure import Figure, figure_of
from sidepath.bench.models import DType, Shape, token_ids
from sidepath.bench.setting import Bench
from sidepath.bench.step import FLOOR, FULL, Step, losses_of, step_of

COMPILED = ", compiled"


@dataclass(frozen=True)
class Compiled:
    """A training step, or a forward pass, eager and compiled, ours and PEFT's."""

    training: bool
    dtype: DType
    rows: int
    tokens: int
    shape: Shape = "llama"

    def __call__(self, name: str, bench: Bench) -> Figure:
        torch.compiler.reset()
        actions, reference = self._training(bench) if self.training else self._inference(bench)
        samples, peaks = bench.timed(actions, warmup=2)
        pass_ = "training step" if self.training else "forward pass"
        shape = f"{bench.rows(self.rows)} x {bench.tokens(self.tokens)} tokens"
        return figure_of(
            name,
            f"{pass_}, eager and compiled, {self.shape} {self.dtype}, {shape}",
            samples,
            {},
            reference=reference,
            also=[f"{way}{COMPILED} / {way}" for way in actions if not way.endswith(COMPILED)],
            peak_bytes=peaks,
        )

    def _training(self, bench: Bench) -> tuple[dict[str, Any], str]:
        step = Step(self.shape, self.dtype, self.rows, self.tokens)
        actions = {}
        for ending in ("", COMPILED):
            losses, models = losses_of(step, bench)
            for way in models:
                if way == FULL:
                    continue
                if ending:
                    compile_(models[way], bench)
                actions[way + ending] = step_of(models[way], losses[way], False, fused=False)
        return actions, FLOOR

    def _inference(self, bench: Bench) -> tuple[dict[str, Any], str]:
        actions = {}
        for ending in ("", COMPILED):
            models = answering(self.shape, self.dtype, bench)
            ids_BT = token_ids(models[BASE], bench.rows(self.rows), bench.tokens(self.tokens))
            for way, model in models.items():
                if ending:
                    compile_(model, bench)
                actions[way + ending] = forward_of(model, ids_BT)
        return actions, BASE


def compile_(model: nn.Module, bench: Bench) -> None:
    """Compile a model for fixed shapes, in place; at quick size traced only, no code is made."""
    model.compile(dynamic=False, backend="eager" if bench.quick else "inductor")
