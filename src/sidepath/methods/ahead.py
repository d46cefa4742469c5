"""Trained positions that stand before every row: how a body is called when they do.

The caller counts its own tokens only. What it says of them (mask, positions, types) is moved to
where they stand behind the trained positions, and what comes back has the caller's length again.

Dimensions: B rows, T tokens of this call, S tokens seen so far, P trained positions, D features.
"""

from __future__ import annotations

import inspect
import uuid
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.around import CallDelta
from sidepath.core.views import View
from sidepath.errors import ConfigError, RoutingError, UnsupportedModule
from sidepath.methods.base import Method, Selection

MAX_POSITIONS = 65_536
MARK = "_sidepath_ahead"
"""Where a cache says whose trained positions it begins with."""


class AheadMethod(Method):
    """What methods of trained positions before each row have in common."""

    tokens: int
    train_whole: tuple[str, ...]

    def selection(self) -> Selection:
        return Selection((), body=True, train_whole=self.train_whole)

    @property
    def positions(self) -> int:
        return self.tokens


class Ahead(CallDelta):
    """P trained positions before each row, put there once: a cache that holds them has them."""

    def __init__(self, base: View, count: int) -> None:
        super().__init__()
        self.count = count
        self.mark = uuid.uuid4().hex
        settings = config_of(base.module)
        self.first = first_position(base.module)
        context: int = getattr(settings, "max_position_embeddings", 0) or 0
        room = context - self.first
        self.room = room if context > 0 and learned_positions(base.module, context) else None
        """Positions that the body has a learned vector for; beyond it nothing can stand."""
        if context > 0 and count >= room:
            raise ConfigError(
                f"{count} trained positions leave no room for a row",
                found=f"{count} positions",
                expected=f"fewer than the model's context of {room}",
            )

    def call(self, base: View, *args: Any, **kwargs: Any) -> Any:
        body = BodyCall(base, args, kwargs)
        wants_tuple = body.options.get("return_dict") is False
        body.options["return_dict"] = True
        cache = body.options.get("past_key_values")
        held = body.held()
        self._require_room(body, held)
        if held:
            body.require_own(cache, self.mark, self.count, held)
            body.move(self.count, self.first)
            out: Any = base(**body.options)
        else:
            body.require_unpacked()
            out = self.begin(base, body)
        for begun in (cache, getattr(out, "past_key_values", None)):
            if begun is not None:
                begun.__dict__[MARK] = self.mark
        return out.to_tuple() if wants_tuple else out

    def _require_room(self, body: BodyCall, held: int) -> None:
        wanted = body.tokens + (held or self.count)
        if self.room is not None and wanted > self.room:
            raise RoutingError(
                "a row and the trained positions before it are longer than the model's context",
                where=body.path,
                found=f"{wanted - self.count} tokens behind {self.count} trained positions",
                expected=f"at most {self.room} in all",
                hint="shorten the row",
            )

    @abstractmethod
    def begin(self, base: View, body: BodyCall) -> Any:
        """What the body gives for rows of which nothing was seen before; a cache is begun."""


class BodyCall:
    """One call of a body: its arguments by name, to be changed in place."""

    def __init__(self, base: View, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.path = type(base.module).__name__
        names = list(inspect.signature(base.base_class.forward).parameters)[1:]
        self.accepted = frozenset(names)
        self.options: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        found = self.options.get("input_ids")
        found = self.options.get("inputs_embeds") if found is None else found
        if found is None:
            raise RoutingError("the body was called without tokens", where=self.path)
        self.rows, self.tokens = int(found.shape[0]), int(found.shape[1])
        self.device = found.device
        mask = self.options.get("attention_mask")
        places = self.options.get("position_ids")
        if not isinstance(mask, Tensor | None) or (mask is not None and mask.dim() != 2):
            raise self._refused("an attention mask that is made for each pair of tokens", "(B, S)")
        if places is not None and places.dim() != 2:
            raise self._refused("positions in several dimensions", "(B, T)")

    def _refused(self, what: str, expected: str) -> RoutingError:
        return RoutingError(
            f"{what} cannot be moved behind trained positions",
            where=self.path,
            expected=f"shape {expected}",
            hint="let the model make it (a dynamic cache, a mask of one number a token)",
        )

    def held(self) -> int:
        """Positions that the given cache holds already."""
        cache = self.options.get("past_key_values")
        if cache is None:
            return 0
        if cache.get_max_length(0) > 0 and not any(layer.is_sliding for layer in cache.layers):
            raise RoutingError(
                "a cache of fixed size has no room for trained positions that its maker did not "
                "count",
                where=self.path,
                found=type(cache).__name__,
                hint='use a dynamic cache: generate(..., cache_implementation="dynamic")',
            )
        return int(cache.get_seq_length())

    def require_own(self, cache: Any, mark: str, count: int, held: int) -> None:
        """Refuse a cache that was begun without these trained positions, or counted with them."""
        if cache.__dict__.get(MARK) != mark:
            raise RoutingError(
                "the cache was begun without this adapter's trained positions",
                where=self.path,
                found=f"a cache of {held} positions",
                hint="begin with an empty cache while the adapter is active",
            )
        wanted = held - count + self.tokens
        mask, places = self.options.get("attention_mask"), self.options.get("position_ids")
        found = wanted
        if mask is not None:
            found = mask.shape[1]
        elif places is not None:
            found = int(places.max()) + 1
        if found != wanted:
            raise RoutingError(
                "the caller counts the trained positions in the cache as tokens of its own, and "
                "so left out as many of its tokens",
                where=self.path,
                found=f"{found} tokens seen by mask or positions",
                expected=f"{wanted}: {held} in the cache, less {count}, and {self.tokens} new ones",
                hint="give the new tokens only, or begin again with an empty cache",
            )

    def require_unpacked(self) -> None:
        """Refuse rows of several examples, of which the first alone would see what stands ahead."""
        places = self.options.get("position_ids")
        if places is None or self.options.get("attention_mask") is not None:
            return
        if self.tokens > 1 and bool((places.diff(dim=1) != 1).any()):
            raise RoutingError(
                "several examples in one row cannot share positions put before the row",
                where=self.path,
                found="positions that begin again within a row",
                hint="train without packing",
            )

    def move(self, count: int, first: int, *, held: bool = True) -> None:
        """Say of the tokens that they stand behind `count` positions. In place.

        Positions are counted from the mask where the caller gives none, so that padding on the
        left moves nothing. `held`: the positions are in the cache; otherwise they come with this
        call, and are said too.
        """
        options = self.options
        mask = options.get("attention_mask")
        ahead_BP = torch.ones(self.rows, count, dtype=torch.long, device=self.device)
        if "position_ids" in self.accepted:
            places = options.get("position_ids")
            if places is None and mask is not None:
                places = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -self.tokens :] + first
            if places is not None:
                places = (places + count).expand(self.rows, -1)
                if not held:
                    own_BP = (ahead_BP.cumsum(1) - 1 + first).to(places.dtype)
                    places = torch.cat([own_BP, places], dim=1)
                options["position_ids"] = places
        if mask is not None:
            options["attention_mask"] = torch.cat([ahead_BP.to(mask), mask], dim=1)
        types = options.get("token_type_ids")
        if types is not None and not held:
            options["token_type_ids"] = torch.cat([torch.zeros_like(ahead_BP).to(types), types], 1)


def cut(out: Any, count: int, body: nn.Module) -> Any:
    """A body's output without the first `count` positions of what it says of each. In place."""
    hidden_BTD = out.last_hidden_state[:, count:]
    out.last_hidden_state = hidden_BTD
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(state[:, count:] for state in out.hidden_states)
    if getattr(out, "attentions", None) is not None:
        out.attentions = tuple(scores[:, :, count:] for scores in out.attentions)
    if getattr(out, "pooler_output", None) is not None:  # it looked at the first position
        out.pooler_output = body.pooler(hidden_BTD)  # type: ignore[operator]
    return out


def config_of(body: nn.Module) -> Any:
    """The settings of a transformers body. Errors: `UnsupportedModule` without any."""
    settings = getattr(body, "config", None)
    if settings is None:
        raise UnsupportedModule("a body without a config of its own", found=type(body).__name__)
    return settings.get_text_config()


def word_embedding(body: nn.Module) -> nn.Module:
    """The layer that makes embeddings of token ids. Errors: `UnsupportedModule` without one."""
    getter = getattr(body, "get_input_embeddings", None)
    found = getter() if callable(getter) else None
    if not isinstance(found, nn.Module) or not isinstance(getattr(found, "weight", None), Tensor):
        raise UnsupportedModule("a body without word embeddings", found=type(body).__name__)
    return found


def learned_positions(body: nn.Module, context: int) -> bool:
    """Whether the body looks its positions up in a table of learned vectors."""
    words = word_embedding(body)
    return any(
        isinstance(module, nn.Embedding)
        and module is not words
        and module.num_embeddings >= context
        and "rel_" not in name  # distances, which are clamped and have no end (DeBERTa)
        for name, module in body.named_modules()
    )


def first_position(body: nn.Module) -> int:
    """The number of a row's first position: behind the padding's where that has one (RoBERTa)."""
    for name, module in body.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
