"""The one place that knows how models are built: their words, fused projections, numbers.

Everything is read off the module tree; the tables hold only what a tree cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from sidepath.core.adapted import CHILD
from sidepath.core.views import DenseView, view_of
from sidepath.errors import TargetNotFound
from sidepath.kernels.lowrank import Part

ATTENTION_WORDS = ("attn", "attention")
"""A module below one whose name holds such a word belongs to the attention block."""

EXPERT_WORD = "expert"
"""A module whose name holds this word is one of a mixture, or all of them in one."""

FUSED: dict[str, tuple[str, ...]] = {
    "c_attn": ("q", "k", "v"),
    "qkv_proj": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
}
"""Fused projections whose parts lie one after the other, by the module's own name."""

ATTENTION_MATRICES: tuple[dict[str, str], ...] = (
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"},
    {"q": "query", "k": "key", "v": "value", "o": "attention.output.dense"},
    {"q": "query_proj", "k": "key_proj", "v": "value_proj", "o": "attention.output.dense"},
    {"q": "c_attn:q", "k": "c_attn:k", "v": "c_attn:v", "o": "attn.c_proj"},
    {
        "q": "SelfAttention.q",
        "k": "SelfAttention.k",
        "v": "SelfAttention.v",
        "o": "SelfAttention.o",
    },
)
"""The four matrices of attention, as targets, in the ways that models name them."""


def attention_matrices(model: nn.Module) -> dict[str, str] | None:
    """The targets that name a model's query, key, value and output matrices; None if unknown."""
    paths = [path for path, _ in modules_of(model)]
    for names in ATTENTION_MATRICES:
        tails = [f".{target.partition(':')[0]}" for target in names.values()]
        if all(any(f".{path}".endswith(tail) for path in paths) for tail in tails):
            return names
    return None


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base by its dotted name, in `named_modules`' order.

    What side paths brought is not even walked: the cost is that of the base, whatever is loaded.
    """
    seen = {model}
    waiting = _children(model, "")
    while waiting:
        path, module = waiting.pop()
        if module not in seen:
            seen.add(module)
            yield path, module
            waiting += _children(module, f"{path}.")


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module that `modules_of` calls so; `get_submodule` looks at each part three times."""
    for part in path.split(".") if path else ():
        child = model._modules[part]
        assert child is not None
        model = child
    return model


def _children(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """A module's children without its side paths, the first one last: as a stack wants them."""
    if not module._modules:
        return []
    return [
        (prefix + name, child)
        for name, child in reversed(module._modules.items())
        if child is not None and name != CHILD
    ]


def dense_views(model: nn.Module) -> dict[str, DenseView]:
    """The views of all dense layers of the base, by path."""
    return {path: view for path, module in modules_of(model) if (view := view_of(module))}


def up_to(path: str, wanted: Callable[[str], bool]) -> str | None:
    """A dotted name up to the first of its parts that is wanted; None where none is."""
    parts = path.split(".")
    first = next((number for number, part in enumerate(parts) if wanted(part)), None)
    return None if first is None else ".".join(parts[: first + 1])


def block_of(path: str) -> str | None:
    """Dotted name of the repeated block a module lies in, itself included; None outside of them.

    A block is known by its number, the first in the name.
    """
    return up_to(path, str.isdigit)


def block_index(path: str) -> int | None:
    """Which repeated block a module belongs to; None outside of them."""
    block = block_of(path)
    return None if block is None else int(block.rpartition(".")[2])


def attention_width(model: nn.Module) -> int | None:
    """Width of all attention heads of all layers together, or None where the config says none.

    A decoder's layers that read an encoder attend twice.
    """
    settings = _settings_of(model)
    heads = _number(settings, "num_attention_heads")
    layers = _number(settings, "num_hidden_layers")
    if not heads or not layers:
        return None
    if getattr(settings, "is_encoder_decoder", False):
        layers += 2 * (_number(settings, "num_decoder_layers", "decoder_layers") or layers)
    hidden = _number(settings, "hidden_size") or 0
    return layers * heads * (_number(settings, "head_dim", "d_kv") or hidden // heads)


def experts_of(model: nn.Module) -> tuple[int, int] | None:
    """To how many experts of a mixture one token is sent, and of how many; None without any."""
    settings = _settings_of(model)
    active = _number(settings, "num_experts_per_tok")
    experts = _number(settings, "num_local_experts", "num_experts", "n_routed_experts")
    return (active, experts) if active and experts else None


def _settings_of(model: nn.Module) -> object:
    """The config of the model's text part; transformers' own names for its numbers hold on it."""
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config


def _number(settings: object, *names: str) -> int | None:
    """The first of these that the config has as a number."""
    found = (getattr(settings, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def fused_parts(model: nn.Module, path: str, names: tuple[str, ...], rows: int) -> tuple[Part, ...]:
    """Row ranges of the named parts of a fused projection with `rows` output rows.

    Raises `TargetNotFound` for a projection that is not known to be fused, or a part it lacks.
    """
    own = path.rpartition(".")[2]
    known = FUSED.get(own)
    if known is None or any(name not in known for name in names):
        raise TargetNotFound(
            f'"{own}:{",".join(names)}" names parts that are not there',
            where=path,
            expected=", ".join(known) if known else f"one of {', '.join(sorted(FUSED))}",
        )
    bounds, start = {}, 0
    for name, size in zip(known, _part_sizes(model, own, rows), strict=True):
        bounds[name] = (start, start + size)
        start += size
    return tuple(sorted(bounds[name] for name in set(names)))


def _part_sizes(model: nn.Module, own: str, rows: int) -> list[int]:
    """Equal parts, except where keys and values have fewer heads than queries."""
    count = len(FUSED[own])
    settings = _settings_of(model)
    heads = _number(settings, "num_attention_heads")
    groups = _number(settings, "num_key_value_heads")
    if own == "qkv_proj" and heads and groups:
        head = rows // (heads + 2 * groups)
        return [heads * head, groups * head, groups * head]
    return [rows // count] * count
