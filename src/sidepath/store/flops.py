"""Arithmetic a token: what training with a method costs, and serving it, merged or apart.

The count is read off the model's matrices; nothing is run.

Dimensions: O out, I in, T tokens of context, W width of all heads of a layer together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sidepath.core.delta import Delta, LayerDelta
from sidepath.core.views import view_of
from sidepath.injection.architecture import (
    attention_width,
    block_of,
    experts_of,
    modules_of,
)
from sidepath.injection.registry import Installed
from sidepath.methods.base import Site


@dataclass(frozen=True)
class Flops:
    """Floating-point operations a token, a multiplication and its addition being two.

    Forward, a matrix costs `2 O I` and a layer's attention `4 T W` (the scores and their product
    with the values; Kaplan et al., 2020, table 1, who count `2 T W`: the mean over the places of a
    causal row, of which a kernel that skips nothing computes all). Going back, each of them costs
    as much again for the gradient of its input (attention twice: both of its products have two
    inputs), and a trained matrix as much once more for its own gradient. So everything trained is
    three forward passes, and N x N matrices with LoRA are `2 N² + 6 N R` multiplications where
    they were `3 N²` (Schulman et al., 2025, "LoRA Without Regret"): forward, the gradient of
    the activations, and thin products three times. Matrices in front of the first trained place
    need no gradient of their input.

    Of a mixture's experts those count that a token is sent to. Lookups, norms, activations,
    softmax and the optimiser are left out, as there; so is the forward pass that gradient
    checkpointing takes again. Heads and poolers that read one token of a row count at every token,
    and so do the sister projections and the inner factors of the first adapted layer for a gradient
    that nobody asks them for: the figures are too high by that, which is under one block.
    """

    matrices: int
    """The base's matrices, forward."""
    beside: int
    """The trained products beside them, forward: `2 r (I + O)` of a LoRA matrix."""
    attention: int | None
    """Attention over the whole context, forward; None where the config names no heads. The totals
    hold it as far as it is known."""
    training: int
    """A step of training: forward, gradients of activations, gradients of what is trained."""
    training_full: int
    """The same with every parameter trained."""
    serving: int
    """Inference with the adapter apart."""
    serving_merged: int | None
    """Inference with the adapter folded in, which is the base's; None for what cannot be folded."""
    context: int
    """Tokens that attention reads."""

    def as_dict(self) -> dict[str, int | None]:
        """The `flops_per_token` of the JSON document of `sidepath plan`."""
        return dict(vars(self))


def flops(model: nn.Module, installed: Installed, context: int) -> Flops:
    """The arithmetic a token of an adapter, its context being so many tokens. Changes nothing.

    `installed` may stand on the model or on a twin of it.
    """
    costs, sites = matrix_costs(model), installed.sites
    behind = _behind_first(model, sites)
    beside = sum(_beside(delta, sites[path], model) for path, delta in installed.deltas.items())
    own = sum(cost for path, cost in costs.items() if _is_trained(path, sites))
    reached = sum(cost for path, cost in costs.items() if path in behind)
    width = attention_width(model)
    attention = 4 * context * (width or 0)
    blocks = len(_blocks(path for path, _ in modules_of(model)))
    attention_reached = attention * len(_blocks(behind)) // max(1, blocks)
    matrices = sum(costs.values())
    forward = matrices + beside + attention
    foldable = not any(isinstance(delta, LayerDelta) for delta in installed.deltas.values())
    return Flops(
        matrices=matrices,
        beside=beside,
        attention=None if width is None else attention,
        training=forward + reached + own + 2 * beside + 2 * attention_reached,
        training_full=3 * (matrices + attention),
        serving=forward,
        serving_merged=matrices + attention if foldable else None,
        context=context,
    )


def matrix_costs(model: nn.Module) -> dict[str, int]:
    """`2 O I` of every module that multiplies each token with a matrix, in the model's own order.

    A convolution counts as the patch embedding it is in a transformer: once a patch.
    """
    active, experts = experts_of(model) or (0, 0)
    costs: dict[str, int] = {}
    for path, module in modules_of(model):
        view = view_of(module)
        if view is not None:
            if view.kind != "embedding":
                rows, columns = view.shape
                costs[path] = 2 * rows * columns
            continue
        numbers = [_routed(t, active, experts) for t in module._parameters.values() if experts]
        if any(numbers):
            costs[path] = 2 * sum(numbers)
    return costs


def _routed(tensor: Tensor | None, active: int, experts: int) -> int:
    """Numbers a token meets of experts in one tensor (experts, rows, columns), or of a router."""
    if tensor is None or tensor.dim() not in (2, 3) or tensor.shape[0] != experts:
        return 0
    numbers = tensor.numel()
    return numbers if tensor.dim() == 2 else numbers // experts * active


def _is_trained(path: str, trained: Mapping[str, Site]) -> bool:
    """Whether the base's matrix at `path` has a gradient: it, or a module around it, is trained."""
    own = trained.get(path)
    if own is not None and own.kind == "own":
        return True
    return any(
        site.kind == "whole" and f"{path}.".startswith(f"{outer}.")
        for outer, site in trained.items()
    )


def _behind_first(model: nn.Module, trained: Mapping[str, Site]) -> set[str]:
    """The modules that run behind the first trained one, in the model's own order."""
    paths = [path for path, _ in modules_of(model)]
    first = next((number for number, path in enumerate(paths) if path in trained), len(paths))
    return set(paths[first + 1 :])


def _blocks(paths: Iterable[str]) -> set[str]:
    """The repeated blocks that these modules lie in."""
    return {block for path in paths if (block := block_of(path)) is not None}


def _beside(delta: Delta, site: Site, model: nn.Module) -> int:
    """What an adapter's own products at one place cost: two a number of its matrices.

    Prefixes count alike: each of their numbers is in one product of the attention. A copy of the
    base's own parameters stands in its place and costs nothing more.
    """
    if site.kind in ("own", "whole", "bias"):
        return 0
    own = dict(delta.named_parameters())
    view = view_of(model.get_submodule(site.path)) if site.path else None
    if view is not None and view.kind == "embedding":
        own = {name: one for name, one in own.items() if name not in ("A", "rows")}  # looked up
    return 2 * sum(tensor.numel() for tensor in own.values() if tensor.dim() == 2)
