"""Inference with one adapter that is not merged: decoding with a cache, and the prefill."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.bench.figure import OURS, PEER, Figure, Targets, figure_of
from sidepath.bench.models import DType, Shape, make, token_ids
from sidepath.bench.peers import has_peft, require_agreement, with_ours, with_peft
from sidepath.bench.setting import Bench
from sidepath.bench.timing import Action

BASE = "base"
TOLERANCES: dict[DType, float] = {"float32": 1e-3, "bfloat16": 6e-2}
"""How far logits may be apart, relative to the largest: roundings of twelve blocks."""
PROMPT, STEPS = 32, 4
"""Tokens in the cache before decoding starts, and tokens decoded in one timed run."""


@dataclass(frozen=True)
class Prefill:
    """One forward pass over whole rows, without a cache."""

    dtype: DType
    rows: int
    tokens: int
    targets: Targets = field(default_factory=dict)
    shape: Shape = "llama"
    warmup: int = 2

    def __call__(self, name: str, bench: Bench) -> Figure:
        models = answering(self.shape, self.dtype, bench)
        ids_BT = token_ids(models[BASE], bench.rows(self.rows), bench.tokens(self.tokens))
        require_same_logits(models, ids_BT, self.dtype)
        actions = {way: forward_of(model, ids_BT) for way, model in models.items()}
        samples, peaks = bench.timed(actions, warmup=self.warmup)
        what = f"prefill, {self.shape} {self.dtype}, {ids_BT.shape[0]} x {ids_BT.shape[1]} tokens"
        return figure_of(
            name,
            f"{what}, one adapter that is not merged",
            samples,
            self.targets,
            reference=BASE,
            peak_bytes=peaks,
        )


@dataclass(frozen=True)
class Decode:
    """Tokens decoded one after the other, each with all that came before it in a cache."""

    dtype: DType
    rows: int
    targets: Targets = field(default_factory=dict)
    shape: Shape = "llama"

    def __call__(self, name: str, bench: Bench) -> Figure:
        models = answering(self.shape, self.dtype, bench)
        ids_BT = token_ids(models[BASE], bench.rows(self.rows), bench.tokens(PROMPT))
        require_same_logits(models, ids_BT, self.dtype)
        decoders = {way: Decoder(model, ids_BT) for way, model in models.items()}
        samples, peaks = bench.timed(
            {way: decoder.run for way, decoder in decoders.items()},
            before={way: decoder.reset for way, decoder in decoders.items()},
        )
        what = f"decode, {self.shape} {self.dtype}, {ids_BT.shape[0]} rows"
        return figure_of(
            name,
            f"{what}, one adapter that is not merged",
            samples,
            self.targets,
            reference=BASE,
            notes=[f"{STEPS} tokens a row after {ids_BT.shape[1]} in the cache"],
            peak_bytes=peaks,
        )


class Decoder:
    """A model with a prompt in its cache; `run` decodes `STEPS` tokens, `reset` takes them back."""

    def __init__(self, model: nn.Module, ids_BT: Tensor, **options: object) -> None:
        self.model, self.options, self.next_B1 = model, options, ids_BT[:, -1:]
        with torch.no_grad():
            made = model(input_ids=ids_BT, use_cache=True, **options)
        self.filled: Any = made.past_key_values
        self.reset()

    def reset(self) -> None:
        """Put the cache back to the prompt."""
        self.cache = copy.deepcopy(self.filled)

    @torch.no_grad()
    def run(self) -> None:
        """Decode; which token comes next makes no difference to the time."""
        for _ in range(STEPS):
            self.model(
                input_ids=self.next_B1,
                past_key_values=self.cache,
                use_cache=True,
                **self.options,
            )


def answering(
    shape: Shape, dtype: DType, bench: Bench, *, names: tuple[str, ...] = ("ours",)
) -> dict[str, nn.Module]:
    """The base alone, ours, and PEFT's where it is installed: equal weights, for inference."""

    def fresh() -> nn.Module:
        return make(shape, dtype, bench.device, quick=bench.quick)

    models = {BASE: fresh(), OURS: with_ours(fresh(), names)}
    if has_peft():
        models[PEER] = with_peft(fresh(), names)
    return {way: model.eval() for way, model in models.items()}


def forward_of(model: nn.Module, ids_BT: Tensor, **options: object) -> Action:
    """One forward pass without gradients and without a cache."""

    def run() -> Any:
        with torch.no_grad():
            return model(input_ids=ids_BT, use_cache=False, **options)

    return run


def require_same_logits(
    models: dict[str, nn.Module],
    ids_BT: Tensor,
    dtype: DType,
    forwards: Mapping[str, Action] | None = None,
) -> None:
    """Raise `ParityError` unless ours and the peer's logits agree. Roundings add up as a random
    walk does: a model of more than twelve blocks may be further apart.
    """
    base: Any = models[BASE]
    deeper = math.sqrt(max(12, base.config.num_hidden_layers) / 12)
    run = forwards or {way: forward_of(model, ids_BT) for way, model in models.items()}
    made: dict[str, Any] = {way: run[way]() for way in models if way != BASE}
    found = {way: output.logits for way, output in made.items()}
    require_agreement(found, TOLERANCES[dtype] * deeper)
