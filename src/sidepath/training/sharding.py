"""A frozen base in shards, one a process, with whole adapters beside it (FSDP2).

Each block of the base gathers its weights when it runs and lets them go afterwards, so that a
process holds 1/n of the base and one block. Adapters are left out of the shards: they are
small, every process holds them whole, and so they are trained and saved as ever.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sidepath.errors import TrainError
from sidepath.injection.registry import base_parameters, require_registry
from sidepath.store.fingerprint import fingerprint
from sidepath.training.processes import Processes


def shard(model: nn.Module, processes: Processes) -> None:
    """Split the base's weights over the processes. Changes `model` in place, for good.

    Every process must call this, with the same model. The base's fingerprint is taken before
    its weights are split and kept on the model, so that adapters can still be checked and saved.

    Errors: `TrainError` without torch.distributed, for weights that cannot be split (4-bit
    ones), or for a base that is not frozen; `UnknownAdapter` for a model without an adapter.
    """
    registry = require_registry(model)
    faults = [
        f"{name}: {'trained' if parameter.requires_grad else str(parameter.dtype)}"
        for name, parameter in base_parameters(model)
        if parameter.requires_grad or not parameter.is_floating_point()
    ]
    if faults:
        raise TrainError(
            "only a frozen base of floating-point weights is sharded",
            faults=faults,
            hint="--distributed ddp keeps the whole base in each process",
        )
    if not torch.distributed.is_initialized():
        raise TrainError("sharding needs torch.distributed", hint="start with torchrun")
    registry.sampled = fingerprint(model).samples
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    whole = {p for installed in registry.adapters.values() for p in installed.parameters()}
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: the blocks a transformers model names, or
    else the members of its longest `ModuleList`.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    named = [module for module in model.modules() if type(module).__name__ in names]
    if named:
        return named
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])
