"""The one place that knows how models are built: heads, attention blocks, fused projections.

Everything is read off the module tree; the tables hold only what a tree cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from sidepath.core.adapted import CHILD
from sidepath.core.views import view_of
from sidepath.errors import TargetNotFound
from sidepath.kernels.lowrank import Part

PRESETS = ("all-linear", "attention", "mlp")

ATTENTION_WORDS = ("attn", "attention")
"""A module below one whose name holds such a word belongs to the attention block."""

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


def _children(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """A module's children without its side paths, the first one last: as a stack wants them."""
    if not module._modules:
        return []
    return [
        (prefix + name, child)
        for name, child in reversed(module._modules.items())
        if child is not None and name != CHILD
    ]


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that turns hidden states into logits over the vocabulary, if there is one."""
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def body_prefix(model: nn.Module) -> str:
    """Dotted prefix of the model without its heads (`model.`); empty when it has none."""
    name = getattr(model, "base_model_prefix", "")
    body = getattr(model, name, None) if name else None
    return f"{name}." if isinstance(body, nn.Module) else ""


def head_paths(model: nn.Module) -> list[str]:
    """Top-level modules with weights that stand outside the body: the task's heads."""
    prefix = body_prefix(model)
    if not prefix:
        return []
    return [
        name
        for name, child in model.named_children()
        if f"{name}." != prefix and next(child.parameters(), None) is not None
    ]


def heads_of(model: nn.Module) -> list[str]:
    """The task's heads; of a language model the layer that makes its logits."""
    last = output_embedding(model)
    return head_paths(model) or [path for path, module in modules_of(model) if module is last]


def preset_paths(model: nn.Module, preset: str) -> list[str]:
    """The dense layers a preset names: linear layers of the body, without head or embeddings."""
    last = output_embedding(model)
    heads = tuple(f"{path}." for path in head_paths(model))
    linear = []
    for path, module in modules_of(model):
        view = None if module is last or f"{path}.".startswith(heads) else view_of(module)
        if view is not None and view.kind in ("linear", "conv1d_transposed"):
            linear.append(path)
    if preset == "all-linear":
        return linear
    repeated = [path for path in linear if block_index(path) is not None]
    wanted = preset == "attention"
    return [path for path in repeated if _in_attention(path) == wanted]


def _in_attention(path: str) -> bool:
    parents = path.lower().split(".")[:-1]
    return any(word in parent for parent in parents for word in ATTENTION_WORDS)


def block_index(path: str) -> int | None:
    """Which repeated block a module belongs to: the first number in its dotted name."""
    numbers = [part for part in path.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None


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
    settings = _settings(model)
    heads, groups = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    if own == "qkv_proj" and heads and groups:
        head = rows // (heads + 2 * groups)
        return [heads * head, groups * head, groups * head]
    return [rows // count] * count


def _settings(model: nn.Module) -> Mapping[str, int]:
    config = getattr(model, "config", None)
    return vars(config) if config is not None else {}
