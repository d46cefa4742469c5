"""What transformers calls a model's tensors on disk, and which of them it stores once (floor 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.errors import TiedWeights
from sidepath.injection.architecture import modules_of
from sidepath.injection.registry import Installed


def stored_once(model: Any, state: Mapping[str, Tensor]) -> list[str]:
    """The names of `state` that a folder holds: of tied tensors one, none that the class drops."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    dropped = set(model._keys_to_ignore_on_save or ())
    kept = {name: tensor.detach() for name, tensor in state.items() if name not in dropped}
    return list(remove_tied_weights_from_state_dict(kept, model))


def names_on_disk(model: Any, names: Iterable[str]) -> dict[str, str] | None:
    """Each tensor's name in a folder; None where a folder holds others than the model does.

    transformers renames what older checkpoints call otherwise, and puts some tensors together while
    it loads (the experts of a mixture); what is saved has the checkpoint's names and tensors again.
    """
    from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

    conversions = model._weight_conversions or ()
    if not all(isinstance(one, WeightRenaming) for one in conversions):
        return None
    stand_ins = {name: torch.empty(0, device="meta") for name in names}
    found = revert_weight_conversion(model, dict(stand_ins))
    by_tensor = {id(tensor): name for name, tensor in found.items()}
    return {name: by_tensor[id(tensor)] for name, tensor in stand_ins.items()}


def as_on_disk(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a model as a folder holds them: those put together while loading apart."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return found


def untie(model: nn.Module, cls: Any, installed: Installed, touched: Iterable[str]) -> list[str]:
    """Part tied tensors of which merging changes one side alone; returns all their names.

    `cls` is the model's class as transformers has it. Changes `model` in place: each place gets a
    parameter of its own over the same memory, and the config says that the embeddings are not tied.
    Errors: `TiedWeights` where the class ties them whatever its config says.
    """
    parted = [names for names in _tied(model) if _differ(names, installed, set(touched))]
    if not parted:
        return []
    config: Any = model.config
    for settings in {id(one): one for one in (config, config.get_text_config())}.values():
        settings.tie_word_embeddings = False
    _require_apart(cls, config, parted, installed.name)
    for names in parted:
        for full in names[1:]:
            path, _, local = full.rpartition(".")
            module = model.get_submodule(path)
            held = module.get_parameter(local)
            module._parameters[local] = nn.Parameter(held.detach(), held.requires_grad)
    return [name for names in parted for name in names]


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that several modules hold."""
    owners: dict[nn.Parameter, list[str]] = {}
    for path, module in modules_of(model):
        for local, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append(f"{path}.{local}")
    return [names for names in owners.values() if len(names) > 1]


def _differ(names: Sequence[str], installed: Installed, touched: set[str]) -> bool:
    """Whether merging gives the holders of one parameter different numbers."""
    changed = [name for name in names if name in touched]
    deltas = (installed.deltas.get(name.rpartition(".")[0]) for name in changed)
    alike = (delta is not None and delta.shares for delta in deltas)
    return bool(changed) and not (len(changed) == len(names) and all(alike))


def _require_apart(cls: Any, settings: Any, parted: Sequence[Sequence[str]], adapter: str) -> None:
    """Raise unless a fresh model of this config holds the tensors of these names apart."""
    with torch.device("meta"):
        fresh = cls(settings)
    faults = []
    for names in parted:
        held = {id(fresh.get_parameter(name)) for name in names}
        if len(held) < len(names):
            faults.append(" and ".join(names) + " are one tensor in every model of this class")
    if faults:
        raise TiedWeights(
            f'merging "{adapter}" would rewrite a tensor shared with another module',
            faults=faults,
            hint="leave these modules out of the targets",
        )
