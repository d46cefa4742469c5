"""The one place that knows how models are built: heads, attention blocks, fused projections.

Everything is read off the module tree; the tables hold only what a tree cannot tell.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile

from torch import nn

from sidepath.core.adapted import CHILD
from sidepath.core.views import DenseView, view_of
from sidepath.errors import TargetNotFound, UnsupportedModule
from sidepath.kernels.lowrank import Part

PRESETS = (
    *("all-linear", "attention", "mlp"),
    *("attention-output", "mlp-output", "mlp-module", "blocks", "token-embedding"),
)
"""Names for places of any model. The first three are the linear layers of the body; then the
layers that write into the residual stream, the MLPs and the blocks as whole modules, and the table
that token ids are looked up in. See `preset_paths`."""

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


def body_path(model: nn.Module) -> str:
    """Dotted name of the module that turns token ids, or their embeddings, into hidden states.

    Errors: `UnsupportedModule` for a model in which no single call does that.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModule(
            "no one call of this model's body sees a row: encoder and decoder are called apart "
            "while text is generated, and both read one mask",
            found=type(model).__name__,
            hint="adapt matrices of the model instead",
        )
    path = body_prefix(model).removesuffix(".")
    if not path:
        raise UnsupportedModule(
            "the model has no head, so its body is no module of it whose call could be changed",
            found=type(model).__name__,
            hint="load it with the head of its task",
        )
    if not _reads_rows(model.get_submodule(path)):
        raise UnsupportedModule(
            "the model's body takes no embeddings of tokens", where=path, found=type(model).__name__
        )
    while inner := [
        name for name, child in model.get_submodule(path).named_children() if _reads_rows(child)
    ]:  # some models call the module inside their body (OPT), or images come in between
        path = f"{path}.{inner[0]}"
    return path


def _reads_rows(module: nn.Module) -> bool:
    """Whether a module is called with whole rows of tokens or of their embeddings."""
    return {"inputs_embeds", "attention_mask"} <= set(
        inspect.signature(type(module).forward).parameters
    )


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


def dense_views(model: nn.Module) -> dict[str, DenseView]:
    """The views of all dense layers of the base, by path."""
    return {path: view for path, module in modules_of(model) if (view := view_of(module))}


def preset_paths(
    model: nn.Module, preset: str, views: Mapping[str, DenseView] | None = None
) -> list[str]:
    """The modules a preset names.

    `all-linear`, `attention`, `mlp`: linear layers of the body, without head or embeddings.
    `attention-output`, `mlp-output`: the layer of each attention (T5: cross-attention too) and of
    each MLP that writes into the residual stream. A mixture of experts has no such layer, each
    token's sum being made behind all of them: there it is the mixture as a whole. `mlp-module`: the
    MLPs as whole modules, so that their input is at hand. `blocks`: the repeated blocks.
    `token-embedding`: where token ids are looked up.

    `views`: what `dense_views` gives, where it is known already.
    Raises `UnsupportedModule` where a model has MLPs and none of them is a module of its own.
    """
    if preset in _PLACES:
        return _PLACES[preset](model)
    last = output_embedding(model)
    heads = tuple(f"{path}." for path in head_paths(model))
    linear = [
        path
        for path, view in (dense_views(model) if views is None else views).items()
        if view.kind in ("linear", "conv1d_transposed")
        and view.module is not last
        and not f"{path}.".startswith(heads)
    ]
    if preset == "all-linear":
        return linear
    repeated = [path for path in linear if block_index(path) is not None]
    wanted = preset == "attention"
    return [path for path in repeated if _in_attention(path) == wanted]


def _in_attention(path: str) -> bool:
    parents = path.lower().split(".")[:-1]
    return any(word in parent for parent in parents for word in ATTENTION_WORDS)


def _attention_outputs(model: nn.Module) -> list[str]:
    groups: dict[str, list[str]] = {}
    for path in preset_paths(model, "attention"):
        parts = path.lower().split(".")[:-1]
        at = next(
            i for i, part in enumerate(parts) if any(word in part for word in ATTENTION_WORDS)
        )
        groups.setdefault(".".join(path.split(".")[: at + 1]), []).append(path)
    return _writers(model, groups)


def _mlp_outputs(model: nn.Module) -> list[str]:
    mixtures = _mixtures(model)
    return [*mixtures.values(), *_writers(model, _mlps(model, mixtures))]


def _mlp_modules(model: nn.Module) -> list[str]:
    mixtures = _mixtures(model)
    found, faults = list(mixtures.values()), []
    for block, paths in _mlps(model, mixtures).items():
        parents = zip(*(path.split(".")[:-1] for path in paths), strict=False)
        common = ".".join(same[0] for same in takewhile(lambda same: len({*same}) == 1, parents))
        if common == block:
            names = ", ".join(path.removeprefix(f"{block}.") for path in paths)
            faults.append(f"{block}: {names} stand in the block itself")
        else:
            found.append(common)
    if faults:
        raise UnsupportedModule(
            "the MLP is no module of its own here: nothing can stand beside it and see its input",
            faults=faults,
            hint='stand behind its last layer instead: "mlp-output"',
        )
    return found


def _blocks(model: nn.Module) -> list[str]:
    linear = (*preset_paths(model, "attention"), *preset_paths(model, "mlp"))
    return list(dict.fromkeys(block for path in linear if (block := _block_of(path))))


def _token_embeddings(model: nn.Module) -> list[str]:
    """Of modules that share one table the innermost: T5 has one a stack, and one never run."""
    getter = getattr(model, "get_input_embeddings", None)
    table = getattr(getter() if callable(getter) else None, "weight", None)
    found = [
        path
        for path, module in modules_of(model)
        if table is not None and module._parameters.get("weight") is table
        if (view := view_of(module)) is not None and view.kind == "embedding"
    ]
    depth = max((path.count(".") for path in found), default=0)
    return [path for path in found if path.count(".") == depth]


_PLACES: Mapping[str, Callable[[nn.Module], list[str]]] = {
    "attention-output": _attention_outputs,
    "mlp-output": _mlp_outputs,
    "mlp-module": _mlp_modules,
    "blocks": _blocks,
    "token-embedding": _token_embeddings,
}


def _mlps(model: nn.Module, mixtures: Mapping[str, str]) -> dict[str, list[str]]:
    """The linear layers of each block's MLP, by the block's path; blocks of experts left out."""
    groups: dict[str, list[str]] = {}
    for path in preset_paths(model, "mlp"):
        block = _block_of(path)
        if block is not None and block not in mixtures:
            groups.setdefault(block, []).append(path)
    return groups


def _mixtures(model: nn.Module) -> dict[str, str]:
    """The module that holds a block's experts and whatever chooses among them, by block."""
    found: dict[str, str] = {}
    for path, _ in modules_of(model):
        block, parts = _block_of(path), path.split(".")
        at = next((i for i, part in enumerate(parts) if EXPERT_WORD in part.lower()), None)
        mixture = ".".join(parts[:at]) if at is not None else ""
        if block is not None and mixture.startswith(f"{block}."):
            found.setdefault(block, mixture)
    return found


def _writers(model: nn.Module, groups: Mapping[str, list[str]]) -> list[str]:
    """Of each group the last layer that gives as many numbers as the first one takes."""
    modules = dict(modules_of(model))
    found = []
    for paths in groups.values():
        shapes = {path: view.shape for path in paths if (view := view_of(modules[path]))}
        width = shapes[paths[0]][1]
        found += [path for path in reversed(paths) if shapes[path][0] == width][:1]
    return found


def _block_of(path: str) -> str | None:
    """The path of the repeated block a module belongs to."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[: at + 1])


def block_index(path: str) -> int | None:
    """Which repeated block a module belongs to: the first number in its dotted name."""
    numbers = [part for part in path.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None


def block_of(path: str) -> str | None:
    """Dotted name of the repeated block a module lies in, itself included; None outside of them."""
    parts = path.split(".")
    first = next((number for number, part in enumerate(parts) if part.isdigit()), None)
    return None if first is None else ".".join(parts[: first + 1])


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
    settings = _settings(model)
    heads, groups = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    if own == "qkv_proj" and heads and groups:
        head = rows // (heads + 2 * groups)
        return [heads * head, groups * head, groups * head]
    return [rows // count] * count


def _settings(model: nn.Module) -> Mapping[str, int]:
    config = getattr(model, "config", None)
    return vars(config) if config is not None else {}
