"""The places of a model that presets name, found by structure in models of any family (floor 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import takewhile

from torch import nn

from sidepath.core.views import DenseView, view_of
from sidepath.errors import UnsupportedModule
from sidepath.injection.architecture import (
    ATTENTION_WORDS,
    EXPERT_WORD,
    block_of,
    dense_views,
    modules_of,
    up_to,
)
from sidepath.injection.body import head_paths, output_embedding

PRESETS = (
    *("all-linear", "attention", "mlp"),
    *("attention-output", "mlp-output", "mlp-module", "blocks", "token-embedding"),
)
"""Names for places of any model. The first three are the linear layers of the body; then the
layers that write into the residual stream, the MLPs and the blocks as whole modules, and the table
that token ids are looked up in. See `preset_paths`."""


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
    repeated = [path for path in linear if block_of(path) is not None]
    wanted = preset == "attention"
    return [path for path in repeated if (_attention_of(path) is not None) == wanted]


def _attention_of(path: str) -> str | None:
    """The path of the attention a module lies in; None outside of any."""
    parent = path.rpartition(".")[0]
    return up_to(parent, lambda part: any(word in part.lower() for word in ATTENTION_WORDS))


def _attention_outputs(model: nn.Module) -> list[str]:
    groups: dict[str, list[str]] = {}
    for path in preset_paths(model, "attention"):
        attention = _attention_of(path)
        if attention is not None:
            groups.setdefault(attention, []).append(path)
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
    return list(dict.fromkeys(block for path in linear if (block := block_of(path))))


def _token_embeddings(model: nn.Module) -> list[str]:
    """Of modules that share one table the innermost: T5 has one a stack, and one never run."""
    table = _input_table(model)
    found = [
        path
        for path, module in modules_of(model)
        if table is not None and module._parameters.get("weight") is table
        if (view := view_of(module)) is not None and view.kind == "embedding"
    ]
    depth = max((path.count(".") for path in found), default=0)
    return [path for path in found if path.count(".") == depth]


def _input_table(model: nn.Module) -> object:
    """The tensor token ids are looked up in, if there is one."""
    getter = getattr(model, "get_input_embeddings", None)
    return getattr(getter() if callable(getter) else None, "weight", None)


def token_tables(model: nn.Module) -> list[str]:
    """The modules that hold the table token ids are looked up in, or that of the head; tied ones
    are one table. Empty for a model that takes no tokens.
    """
    tables = [_input_table(model), getattr(output_embedding(model), "weight", None)]
    found = {
        path: module
        for path, module in modules_of(model)
        if any(own is not None and module._parameters.get("weight") is own for own in tables)
    }
    kinds = {view.kind for module in found.values() if (view := view_of(module))}
    return list(found) if "embedding" in kinds else []


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
        block = block_of(path)
        if block is not None and block not in mixtures:
            groups.setdefault(block, []).append(path)
    return groups


def _mixtures(model: nn.Module) -> dict[str, str]:
    """The module that holds a block's experts and whatever chooses among them, by block."""
    found: dict[str, str] = {}
    for path, _ in modules_of(model):
        block = block_of(path)
        experts = up_to(path, lambda part: EXPERT_WORD in part.lower()) or ""
        mixture = experts.rpartition(".")[0]
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
