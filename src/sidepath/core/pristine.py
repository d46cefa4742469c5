"""Copies of modules as they were before anything of ours came to them."""

from __future__ import annotations

import copy

from torch import nn

from sidepath.core.adapted import CHILD, SidePaths, restore
from sidepath.core.blocks import unfuse
from sidepath.core.laid_out import put_back


def pristine_copy(module: nn.Module) -> nn.Module:
    """A deep copy of a module, and of all below it, as it was before any side path came."""
    # Copied one by one, so that a twin of fake tensors (a plan) can be copied too.
    memo: dict[int, object] = {
        id(own): nn.Parameter(own.detach().clone(), own.requires_grad)
        for own in module.parameters()
        if own.is_floating_point()
    }
    memo |= {id(own): own.detach().clone() for own in module.buffers()}
    twin = copy.deepcopy(module, memo)
    for inner in list(twin.modules()):
        side = inner._modules.get(CHILD)
        if isinstance(side, SidePaths):
            restore(side)
        unfuse(inner)
    put_back(twin)
    return twin
