"""The file of an adapter whose method PEFT has no form for: each tensor by its path (floor 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from sidepath.core.delta import Delta
from sidepath.core.views import View, view_of
from sidepath.errors import SidepathError
from sidepath.injection.architecture import modules_of
from sidepath.injection.registry import Installed
from sidepath.methods.base import Method, Site
from sidepath.methods.lora import LoRA
from sidepath.store import peft_format
from sidepath.store.memory import weightless
from sidepath.store.peft_format import Slot


def slots_of(installed: Installed, modules: Mapping[str, nn.Module]) -> list[Slot]:
    """The tensors that an adapter's file holds: in PEFT's form for LoRA, else plainly."""
    config = installed.config.saved()
    if isinstance(config, LoRA):
        slots, faults = peft_format.slots_of(modules, config, installed.sites.values())
        assert not faults, faults
        return slots
    return plain_slots(installed.deltas)


def plain_slots(deltas: Mapping[str, Delta]) -> list[Slot]:
    """Every tensor of some deltas as `path.local`."""
    return [
        Slot(f"{path}.{local}", path, local, tuple(tensor.shape))
        for path, delta in deltas.items()
        for local, tensor in delta.tensors().items()
    ]


def expected_slots(
    model: nn.Module, config: Method, sites: Sequence[Site]
) -> tuple[list[Slot], list[str]]:
    """The tensors that a file must hold for these sites of `model`, and the sites' faults.

    The deltas are made on a twin of the model that has shapes and no memory, so that what a
    file asks for costs nothing before it is known to be there. Changes nothing.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    modules = dict(modules_of(model))
    faults = [peft_format.absent(site.path, modules) for site in sites if site.path not in modules]
    if faults:
        return [], faults
    with FakeTensorMode(allow_non_fake_inputs=True):
        twins = dict(modules_of(weightless(model)))
        views = {site.path: view_of(twins[site.path]) or View(twins[site.path]) for site in sites}
        try:
            return plain_slots(config.deltas(sites, views)), []
        except (SidepathError, ValueError, AssertionError) as error:
            return [], [f"{config.method}: {error}"]
