"""Prefix tuning: trained keys and values before each row's own (Li and Liang, 2021, section 4).

Dimensions: B rows, L layers, P trained positions, H heads of keys, K features of a head,
D features of an embedding.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.config import check, require
from sidepath.core.delta import Delta
from sidepath.core.views import View
from sidepath.errors import TrainError, UnsupportedModule
from sidepath.methods.ahead import (
    MAX_POSITIONS,
    Ahead,
    AheadMethod,
    BodyCall,
    config_of,
    word_embedding,
)
from sidepath.methods.base import Saved, filled

START = 0.02
"""Standard deviation of keys and values at the start without a network: transformers' own."""


@dataclass(frozen=True)
class PrefixTuning(AheadMethod):
    """Every layer's attention sees P trained keys and values before the row's own.

    Saved are 2 L P H K numbers, H the heads of keys and values (fewer than those of queries where
    queries are grouped). Only decoders can take it: the prefix stands in their cache. Gradient
    checkpointing drops that cache, so it is refused in training.
    """

    method = "prefix"

    tokens: int = 10
    """Trained positions before each row; they take as many of the model's context."""
    hidden: int | None = 512
    """While training, keys and values are made by a network with so many hidden features
    (section 4.3), which is neither saved nor loaded; none: they are trained themselves."""
    train_whole: tuple[str, ...] = ()
    """Modules trained whole beside them, such as a classification head."""

    def __post_init__(self) -> None:
        check(self)
        rules = {
            "tokens": 1 <= self.tokens <= MAX_POSITIONS,
            "hidden": self.hidden is None or 1 <= self.hidden <= MAX_POSITIONS,
        }
        require(self, rules)

    def body_delta(self, view: View, tensors: Saved = None) -> Delta:
        hidden = self.hidden if tensors is None else None
        return filled(lambda: Prefix(view, self.tokens, hidden), tensors)


class Prefix(Ahead):
    """Keys and values, each `(L, H, P, K)` in float32: trained themselves, or made by `network`."""

    def __init__(self, base: View, count: int, hidden: int | None) -> None:
        super().__init__(base, count)
        layers, heads, features = cache_shape(base.module)
        self.shape = (layers, heads, count, features)
        table = word_embedding(base.module).weight
        assert isinstance(table, Tensor)
        self.dtype = table.dtype
        self.network: Network | None = None
        if hidden is None:
            for name in ("keys", "values"):
                drawn = torch.empty(self.shape, device=table.device).normal_(std=START)
                self.register_parameter(name, nn.Parameter(drawn))
        else:
            width = int(config_of(base.module).hidden_size)
            self.network = Network(count, width, hidden, 2 * layers * heads * features, table)

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (L, H, P, K) each."""
        if self.network is None:
            return self._parameters["keys"], self._parameters["values"]  # type: ignore[return-value]
        layers, heads, count, features = self.shape
        made = self.network().view(count, 2, layers, heads, features).permute(1, 2, 3, 0, 4)
        return made[0], made[1]

    def begin(self, base: View, body: BodyCall) -> Any:
        module, options = base.module, body.options
        if module.training and any(
            getattr(inner, "gradient_checkpointing", False) for inner in module.modules()
        ):
            raise TrainError(
                "gradient checkpointing drops the cache that a prefix stands in",
                where=body.path,
                hint="train without it, or take PromptTuning",
            )
        kept = options.get("use_cache")
        kept = getattr(config_of(module), "use_cache", False) if kept is None else kept
        cache: Any = options.get("past_key_values")
        given = cache is not None
        if not given:
            from transformers import DynamicCache

            cache = options["past_key_values"] = DynamicCache(config=config_of(module))
        keys, values = self.prefix()
        for layer in range(self.shape[0]):
            own = (part[layer].to(self.dtype) for part in (keys, values))
            cache.update(*(part.expand(body.rows, -1, -1, -1) for part in own), layer)
        body.move(self.count, self.first)
        out: Any = base(**options)
        if not (kept or given):
            out.past_key_values = None
        return out

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Keys and values: what is saved, whatever makes them."""
        if self.network is None:
            return dict(self.named_parameters())
        keys, values = self.prefix()
        return {"keys": keys.contiguous(), "values": values.contiguous()}


class Network(nn.Module):
    """`W2 tanh(W1 p + b1) + b2` of a trained `p (D)` for each position: (P, out)."""

    def __init__(self, count: int, width: int, hidden: int, out: int, like: Tensor) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(count, width, device=like.device))
        self.down = nn.Linear(width, hidden, device=like.device)
        self.up = nn.Linear(hidden, out, device=like.device)

    def forward(self) -> Tensor:
        made: Tensor = self.up(torch.tanh(self.down(self.embeddings)))
        return made


def cache_shape(body: nn.Module) -> tuple[int, int, int]:
    """Layers, heads of keys, and features of a head in a body's cache.

    Errors: `UnsupportedModule`, naming everything for which no prefix can stand there.
    """
    settings = config_of(body)
    faults = []
    accepted = inspect.signature(type(body).forward).parameters
    causal = any(getattr(module, "is_causal", False) for module in body.modules())
    if "past_key_values" not in accepted or not causal:
        faults.append("its attention is not causal, so it has no cache that a prefix could begin")
    kinds = set(getattr(settings, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        faults.append(f"its layers are of the kinds {', '.join(sorted(kinds))}")
    for name in ("kv_lora_rank", "multi_query", "num_kv_shared_layers"):
        if getattr(settings, name, None):
            faults.append(f"its cache has a form of its own ({name})")
    if faults:
        raise UnsupportedModule(
            "the model cannot take a prefix of keys and values",
            found=type(body).__name__,
            faults=faults,
            hint="sidepath.PromptTuning puts embeddings before the input's",
        )
    queries = int(settings.num_attention_heads)
    heads = int(getattr(settings, "num_key_value_heads", None) or queries)
    features = int(getattr(settings, "head_dim", None) or settings.hidden_size // queries)
    return int(settings.num_hidden_layers), heads, features
