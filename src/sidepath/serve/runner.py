"""The model's side of a step: rows of tokens in, the logits after each out (floor 5).

Dimensions: B rows, T tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.routing import Rows
from sidepath.errors import UnsupportedModule
from sidepath.injection.registry import registry_of
from sidepath.injection.surgery import route_rows, rows_of
from sidepath.serve.cache import RowsCache
from sidepath.serve.masks import kinds_of, ragged_masks

KEPT = 4
"""Combinations of rows whose stacked factors are kept."""
AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far logits may lie from the model's own, in units of their largest; else 5 %."""


@dataclass(frozen=True)
class Piece:
    """One row's tokens in a call."""

    owner: int
    adapter: str | None
    """The name it has on the model."""
    start: int
    tokens: tuple[int, ...]


class Runner:
    """A causal model of `transformers` with a cache of rows; the model is put into eval mode.

    Errors: `UnsupportedModule` for a model whose rows cannot be kept apart: its kinds of layers are
    asked first, and then its logits for ragged rows are held against its own for each row alone.

    `kept`: rows of the cache beside. Not `routed`: the model answers as it is, whoever is asked.
    """

    def __init__(
        self, model: nn.Module, rows: int, context: int, kept: int = 0, routed: bool = True
    ) -> None:
        self.model: Any = model.eval()
        config: Any = model.config
        self.config: Any = config.get_text_config()
        self.kinds = kinds_of(self.config)
        eager = self.config._attn_implementation == "eager"
        dtype: Any = model.dtype
        self.dtype: torch.dtype = dtype
        device: Any = model.device
        self.device: torch.device = device
        self.added = self.dtype if eager else None
        self.vocabulary = int(self.config.vocab_size)
        layers = int(self.config.num_hidden_layers)
        self._routes = routed
        self._routed: OrderedDict[tuple[str | None, ...], Rows] = OrderedDict()
        self._verify(layers)
        self.cache = RowsCache(layers, rows, context, self.device, kept)

    @torch.no_grad()
    def logits(self, pieces: Sequence[Piece]) -> Tensor:
        """The logits (B, V) after the last token of each piece; all have the same length.

        Writes their keys and values into the cache; doing so again changes nothing.
        """
        with self._route(tuple(piece.adapter for piece in pieces)):
            return self._called(self.cache, pieces)

    def forget(self, adapter: str) -> None:
        """Drop the factors that are kept of an adapter: it leaves the model."""
        for names in [names for names in self._routed if adapter in names]:
            del self._routed[names]

    def _called(self, cache: RowsCache, pieces: Sequence[Piece]) -> Tensor:
        starts = [piece.start for piece in pieces]
        tokens = len(pieces[0].tokens)
        positions_BT = cache.select([piece.owner for piece in pieces], starts, tokens)
        masks = None
        if len(set(starts)) > 1:  # else the model's own
            masks = ragged_masks(self.kinds, positions_BT, max(starts) + tokens, self.added)
        out = self.model(
            input_ids=self._ids([piece.tokens for piece in pieces]),
            attention_mask=masks,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = out.logits[:, -1]
        return logits_BV

    def _ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, device=self.device)

    def _route(self, names: tuple[str | None, ...]) -> AbstractContextManager[None]:
        if not self._routes or registry_of(self.model) is None:
            return nullcontext()
        rows = self._routed.pop(names, None)
        self._routed[names] = rows = rows_of(self.model, names) if rows is None else rows
        if len(self._routed) > KEPT:
            self._routed.popitem(last=False)
        return route_rows(self.model, rows)

    @torch.no_grad()
    def _verify(self, layers: int) -> None:
        """Two rows of 6 and 9 tokens, in pieces and together, against each alone and whole."""
        ids = [tuple(7 * (n + row) % self.vocabulary for n in range(6 + 3 * row)) for row in (0, 1)]
        cache = RowsCache(layers, rows=2, context=len(ids[1]), device=self.device)
        for row in (0, 1):
            cache.claim(row)
        try:
            with self._route((None,)):
                self._called(cache, [Piece(1, None, 0, ids[1][:3])])
            with self._route((None, None)):
                pieces = [Piece(0, None, 0, ids[0][:5]), Piece(1, None, 3, ids[1][3:8])]
                self._called(cache, pieces)
                pieces = [Piece(0, None, 5, ids[0][5:]), Piece(1, None, 8, ids[1][8:])]
                found_BV = self._called(cache, pieces).double()
            with self._route((None,)):
                alone = [self.model(input_ids=self._ids([row])).logits[0, -1] for row in ids]
            expected_BV = torch.stack(alone).double()
            if found_BV.shape != (2, self.vocabulary):
                raise ValueError(f"logits of shape {tuple(found_BV.shape)}")
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            raise UnsupportedModule(
                "this model cannot be called with rows of different lengths",
                found=f"{type(self.model).__name__}: {type(error).__name__}: {error}",
                hint="serve a causal language model of transformers",
            ) from error
        off = float((found_BV - expected_BV).abs().max() / expected_BV.abs().max())
        within = AGREEMENT.get(self.dtype, 0.05)
        if not off <= within:
            raise UnsupportedModule(
                "this model gives other logits when its rows are served together",
                found=f"{type(self.model).__name__}: off by {off:.1e} of the largest",
                expected=f"at most {within:.0e}",
            )
