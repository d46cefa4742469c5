"""Routed batches: rows of many adapters in one pass, ours and PEFT's, over the base alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sidepath.bench.decode import (
    BASE,
    PROMPT,
    STEPS,
    Decoder,
    answering,
    forward_of,
    require_same_logits,
)
from sidepath.bench.figure import OURS, PEER, Figure, Targets, figure_of
from sidepath.bench.models import DType, Shape, token_ids
from sidepath.bench.setting import Bench
from sidepath.bench.timing import Action
from sidepath.injection.registry import require_registry
from sidepath.injection.surgery import route
from sidepath.store.live import storage_bytes

QUICK_ADAPTERS = 2
NEW_BLOCK = "new block"


@dataclass(frozen=True)
class Routed:
    """A batch whose rows belong to several adapters; neighbours share one unless they are mixed."""

    dtype: DType
    rows: int
    adapters: int
    targets: Targets = field(default_factory=dict)
    tokens: int | None = None
    """Tokens of each row in one forward pass; None: tokens are decoded, one at a time."""
    mixed: bool = False
    """Whether neighbours belong to different adapters: row i to adapter i mod n."""
    shape: Shape = "llama"

    def __call__(self, name: str, bench: Bench) -> Figure:
        adapters = min(self.adapters, QUICK_ADAPTERS) if bench.quick else self.adapters
        names = [f"adapter-{number}" for number in range(adapters)]
        models = answering(self.shape, self.dtype, bench, names=tuple(names))
        rows = self.named(names, bench.rows(self.rows))
        measured = self._decoded if self.tokens is None else self._forward
        samples, peaks, notes = measured(bench, models, rows)
        return figure_of(
            name,
            self.described(len(rows), adapters, bench),
            samples,
            self.targets,
            reference=BASE,
            bound=memory_bound(models[OURS]) if self.tokens is None else None,
            notes=notes,
            also=[f"{NEW_BLOCK} / {BASE}"],
            peak_bytes=peaks,
        )

    def named(self, names: Sequence[str], rows: int) -> list[str]:
        """Each row's adapter."""
        if self.mixed:
            return [names[row % len(names)] for row in range(rows)]
        return [names[row * len(names) // rows] for row in range(rows)]

    def described(self, rows: int, adapters: int, bench: Bench) -> str:
        """What is measured, in one line."""
        what = (
            f"routed decode, {rows} rows"
            if self.tokens is None
            else f"routed forward, {rows} x {bench.tokens(self.tokens)} tokens"
        )
        order = "mixed rows" if self.mixed else "rows in their adapters' order"
        return f"{what} of {adapters} adapters, {order}, {self.shape} {self.dtype}"

    def _forward(
        self, bench: Bench, models: dict[str, nn.Module], rows: list[str]
    ) -> tuple[dict[str, list[float]], dict[str, int], list[str]]:
        ids_BT = token_ids(models[BASE], len(rows), bench.tokens(self.tokens or 0))
        options: dict[str, dict[str, Any]] = {PEER: {"adapter_names": rows}}
        actions: dict[str, Action] = {
            way: forward_of(model, ids_BT, **options.get(way, {})) for way, model in models.items()
        }
        actions[NEW_BLOCK] = in_block(models[OURS], rows, actions[OURS])
        with route(models[OURS], rows):
            require_same_logits(models, ids_BT, self.dtype, actions)
            samples, peaks = bench.timed(actions)
        notes = [f"ours: within one `route` block; {NEW_BLOCK}: ours in a block of its own a pass"]
        return samples, peaks, notes

    def _decoded(
        self, bench: Bench, models: dict[str, nn.Module], rows: list[str]
    ) -> tuple[dict[str, list[float]], dict[str, int], list[str]]:
        ids_BT = token_ids(models[BASE], len(rows), bench.tokens(PROMPT))
        options: dict[str, dict[str, Any]] = {PEER: {"adapter_names": rows}}
        with route(models[OURS], rows):
            decoders = {
                way: Decoder(model, ids_BT, **options.get(way, {})) for way, model in models.items()
            }
            samples, peaks = bench.timed(
                {way: decoder.run for way, decoder in decoders.items()},
                before={way: decoder.reset for way, decoder in decoders.items()},
            )
        bound = "the bound counts bytes alone: base weights and factors are each read once a token"
        cached = f"{STEPS} tokens a row after {ids_BT.shape[1]} in the cache, in one `route` block"
        return samples, peaks, [cached, bound]


def in_block(model: nn.Module, rows: Sequence[str], action: Action) -> Action:
    """The action within a `route` block of its own."""

    def run() -> object:
        with route(model, rows):
            return action()

    return run


def memory_bound(model: nn.Module) -> float:
    """(bytes of the base + bytes of all factors) / bytes of the base.

    For n adapters on square layers of width d, in the base's dtype: `1 + 2 n r / d`.
    """
    factors = [
        factor
        for installed in require_registry(model).adapters.values()
        for factor in installed.parameters()
    ]
    mine = {id(factor) for factor in factors}
    base = [own for own in model.parameters() if id(own) not in mine]
    return 1 + storage_bytes(factors) / storage_bytes(base)
