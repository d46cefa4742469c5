"""What a model holds: its adapters, the routing its layers read, and what is merged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sidepath.core.adapted import SidePaths
from sidepath.core.blocks import fuse, unfuse
from sidepath.core.delta import Delta
from sidepath.core.quant import hold_still, let_go
from sidepath.core.routing import Routing
from sidepath.errors import BadName, NameTaken, UnknownAdapter, meant
from sidepath.injection.architecture import modules_of
from sidepath.methods.base import Method, Site

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ATTRIBUTE = "_sidepath_registry"
_QUANTISED = "is_quantized"


@dataclass
class Installed:
    """One adapter on a model: its settings, its deltas by module path, and its record."""

    name: str
    config: Method
    sites: dict[str, Site]
    deltas: dict[str, Delta]
    tokens: dict[str, int] = field(default_factory=dict)
    """Ids of the tokens that it brings, by their texts: entries of the tokenizer."""
    record: dict[str, Any] = field(default_factory=dict)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trained parameter of the adapter."""
        for delta in self.deltas.values():
            yield from delta.parameters()


@dataclass
class Registry:
    """All adapters of one model. Kept on the model itself: it is copied and dies with it."""

    adapters: dict[str, Installed] = field(default_factory=dict)
    sides: dict[str, SidePaths] = field(default_factory=dict)
    routing: Routing = field(default_factory=Routing)
    merged: str | None = None
    pristine: dict[str, Tensor] = field(default_factory=dict)
    """While merged: the base's own tensors, by full name, that the merge took out."""
    spare: dict[str, Tensor] = field(default_factory=dict)
    """Memory of matrices merged before, by module path, for the next merge to write into."""
    vocabulary: dict[int, int] = field(default_factory=dict)
    """The base's own number of tokens, in each of its configs, once an adapter knew more."""
    reaches: dict[str, int] = field(default_factory=dict)
    """Of adapters that know more tokens than the base: where the ids end that they know."""
    sampled: Mapping[str, Any] | None = None
    """The base's fingerprint, kept where its weights are no longer whole (sharded), or where they
    are windows onto a file that are not to be looked through twice."""
    quantised: bool = False
    """transformers' own word that the base alone cannot be trained; put down while adapters are
    on it, since its Trainer knows no adapters but PEFT's."""
    frozen: dict[str, bool] = field(default_factory=dict)
    """`requires_grad` of each base parameter before the first injection."""
    held: list[nn.Module] = field(default_factory=list)
    """Quantised layers that are kept from rewriting their own weight."""
    fused: list[nn.Module] = field(default_factory=list)
    """Blocks that may be computed in one piece."""

    def adapter(self, name: str) -> Installed:
        """The adapter of that name, or `UnknownAdapter` with the nearest names."""
        if name not in self.adapters:
            loaded = ", ".join(f'"{known}"' for known in self.adapters) or "none"
            raise UnknownAdapter(
                f'no adapter "{name}" is loaded',
                found=f"loaded: {loaded}",
                hint=meant(name, self.adapters),
            )
        return self.adapters[name]

    def pristine_parameters(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The base's parameters by name, as they were before any merge; side paths left out."""
        for name, parameter in base_parameters(model):
            yield name, self.pristine.get(name, parameter)


def registry_of(model: nn.Module) -> Registry | None:
    """The registry of a model that was injected, or None."""
    registry = model.__dict__.get(_ATTRIBUTE)
    assert registry is None or isinstance(registry, Registry)
    return registry


def require_registry(model: nn.Module) -> Registry:
    """The registry of a model, or `UnknownAdapter` when it holds no adapter."""
    registry = registry_of(model)
    if registry is None:
        raise UnknownAdapter(
            "the model holds no adapter",
            hint="sidepath.inject(model, config) or sidepath.load(model, folder) first",
        )
    return registry


def open_registry(model: nn.Module) -> Registry:
    """The registry of a model, made on the first call: freezes the base. In place."""
    registry = registry_of(model)
    if registry is None:
        registry = Registry()
        for name, parameter in base_parameters(model):
            registry.frozen[name] = parameter.requires_grad
            parameter.requires_grad_(False)
        modules = [model, *(module for _, module in modules_of(model))]
        registry.held = hold_still(modules)
        registry.fused = [module for module in modules if fuse(module, registry.routing)]
        registry.quantised = bool(model.__dict__.get(_QUANTISED))
        if registry.quantised:
            model.__dict__[_QUANTISED] = False
        model.__dict__[_ATTRIBUTE] = registry
    return registry


def close_registry(model: nn.Module, registry: Registry) -> None:
    """Take the registry off a model without adapters and thaw what was not frozen. In place."""
    for name, parameter in base_parameters(model):
        parameter.requires_grad_(registry.frozen.get(name, True))
    let_go(registry.held)
    for module in registry.fused:
        unfuse(module)
    if registry.quantised:
        model.__dict__[_QUANTISED] = True
    del model.__dict__[_ATTRIBUTE]


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's parameters (a tied one once), without those of side paths."""
    seen: set[nn.Parameter] = set()
    for path, module in (("", model), *modules_of(model)):
        for local, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{path}.{local}" if path else local, parameter


def check_name(registry: Registry | None, name: str) -> None:
    """Raise `BadName` or `NameTaken` unless an adapter may be called `name` here."""
    if not NAME.fullmatch(name):
        raise BadName(
            f"{name!r} cannot name an adapter", expected="[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
        )
    if registry is not None and name in registry.adapters:
        raise NameTaken(
            f'an adapter "{name}" is on the model already',
            hint=f'choose another name, or sidepath.remove(model, "{name}") first',
        )
