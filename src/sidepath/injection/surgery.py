"""Put adapters in, take them out, and say which one answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from sidepath.core.adapted import adapt, restore
from sidepath.core.around import CallView
from sidepath.core.delta import Delta
from sidepath.core.routing import Rows, group_rows
from sidepath.core.views import View, view_of
from sidepath.errors import MergeError, UnsupportedModule
from sidepath.injection.architecture import module_at
from sidepath.injection.merging import unfolded
from sidepath.injection.registry import (
    Installed,
    Registry,
    check_name,
    close_registry,
    open_registry,
    registry_of,
    require_registry,
)
from sidepath.injection.vocabulary import forget_tokens, learn_tokens
from sidepath.methods.base import Method, Site


def put_in(
    model: nn.Module,
    config: Method,
    name: str,
    sites: Iterable[Site],
    *,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    trainable: bool = True,
    settle: Callable[[], None] | None = None,
) -> Installed:
    """Stand an adapter beside the modules at `sites`: a fresh one, or one made of `tensors`.

    Changes `model` in place. `tensors` holds those of each delta, by the path of its module; they
    are kept, not copied, where dtype and device allow, and nothing random is drawn. The base is
    frozen; its parameters keep their names and values. Which adapter is active does not change.
    `settle` is called when the deltas are made and nothing has changed yet: it may raise.
    Raises `NameTaken`, `BadName`, or `MergeError` while one is merged in.
    """
    check_name(registry_of(model), name)
    refuse_merged(registry_of(model), f'"{name}" cannot be put in')
    registry = open_registry(model)
    places = {site.path: site for site in sites}
    with _closed_again(model, registry):
        views = {path: _view_at(model, registry, site) for path, site in places.items()}
        if tensors is None:
            config = config.completed(views.values())
        deltas = config.deltas(places.values(), views, tensors)
        for path, delta in deltas.items():
            _as_the_module(delta, views[path].module.training, trainable)
        if settle is not None:
            settle()
    for path, delta in deltas.items():
        if path not in registry.sides:
            registry.sides[path] = adapt(views[path], registry.routing, path)
        registry.sides[path].add(name, delta)
    installed = Installed(name, config, places, deltas)
    registry.adapters[name] = installed
    learn_tokens(model, registry, installed)
    return installed


@contextmanager
def _closed_again(model: nn.Module, registry: Registry) -> Iterator[None]:
    """After an error in the block (no memory, wrong bytes) nothing of ours is left on the model."""
    try:
        yield
    except BaseException:
        if not registry.adapters:
            close_registry(model, registry)
        raise


def _view_at(model: nn.Module, registry: Registry, site: Site) -> View:
    around = site.kind == "body"
    side = registry.sides.get(site.path)
    if side is not None:
        if isinstance(side.view, CallView) != around:
            raise UnsupportedModule(
                "one adapter stands around this module's call and another beside its output",
                where=site.path,
                hint="remove the one before the other is put in",
            )
        return side.view
    module = module_at(model, site.path)
    return CallView(module) if around else view_of(module) or View(module)


def _as_the_module(delta: Delta, training: bool, trainable: bool) -> None:
    """Put a new delta in its module's mode, and freeze it unless it is to be trained."""
    if delta._modules:
        delta.train(training).requires_grad_(trainable)
        return
    delta.__dict__["training"] = training
    if not trainable:
        for parameter in delta._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter out. In place; without any left the model is what it was before the first.

    Raises `UnknownAdapter`, or `MergeError` while an adapter is merged in.
    """
    registry = require_registry(model)
    installed = registry.adapter(name)
    refuse_merged(registry, f'"{name}" cannot be removed')
    for path in installed.deltas:
        side = registry.sides[path]
        side.drop(name)
        if not side._modules:  # no adapter's delta is left here
            restore(side)
            del registry.sides[path]
    del registry.adapters[name]
    forget_tokens(model, registry, name)
    if registry.routing.active == name:
        registry.routing.active = None
    if not registry.adapters:
        close_registry(model, registry)


def activate(model: nn.Module, name: str | None) -> None:
    """Let one adapter answer every row; None: the base alone. One write, whatever is loaded.

    Raises `UnknownAdapter`, or `MergeError` while an adapter is merged in.
    """
    registry = registry_of(model) if name is None else require_registry(model)
    if registry is None:
        return
    if name is not None:
        registry.adapter(name)
    refuse_merged(registry, "the active adapter cannot change")
    registry.routing.active = name


def use_kernels(model: nn.Module, kernels: Literal["fused", "plain"]) -> None:
    """Compute layers with side paths and known blocks of a model in one piece each, or as written.

    "fused" is what a model starts with; the two are equal up to rounding. Nothing happens to a
    model without adapters.
    """
    registry = registry_of(model)
    if registry is not None:
        registry.routing.fused = kernels == "fused"


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the untouched base, to the bit, merged or not."""
    registry = registry_of(model)
    if registry is None:
        yield
        return
    routing = registry.routing
    before = routing.silent
    routing.silent = True
    try:
        with unfolded(model, registry):
            yield
    finally:
        routing.silent = before


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the block row i of each batch is answered by adapter `names[i]`; None: the base.

    Every adapted layer does one base product for all rows, and adds the updates of all of them
    with a handful of operators, however many adapters are named (`kernels/routed.py`). Entering
    costs little: without gradients a layer takes its adapters' factors when it first answers, and
    keeps them until the block ends. Names without dropout, biases or parts of their own share
    products; others are put on one after another.

    Raises `UnknownAdapter` for a name that is not loaded, `MergeError` while one is merged in,
    and, when a batch comes, `RoutingError` unless it has `len(names)` rows.
    """
    with route_rows(model, rows_of(model, names)):
        yield


def rows_of(model: nn.Module, names: Sequence[str | None]) -> Rows:
    """The rows of batches that these adapters answer, for `route_rows`.

    Raises `UnknownAdapter` for a name that is not loaded.
    """
    registry = require_registry(model)
    for name in names:
        if name is not None:
            registry.adapter(name)
    return group_rows(names)


@contextmanager
def route_rows(model: nn.Module, rows: Rows) -> Iterator[None]:
    """`route` for rows that come again: the factors they hold are kept from block to block.

    So the adapters they name must not change or leave meanwhile, nor the base's dtype. Raises as
    `route` does.
    """
    registry = require_registry(model)
    refuse_merged(registry, "rows cannot be routed")
    routing = registry.routing
    before = routing.rows
    routing.rows = rows
    try:
        yield
    finally:
        routing.rows = before


def refuse_merged(registry: Registry | None, what: str) -> None:
    """Raise `MergeError` when an adapter is folded into the weights."""
    if registry is not None and registry.merged is not None:
        raise MergeError(
            f'{what}: adapter "{registry.merged}" is merged into the base',
            hint="sidepath.unmerge(model) first",
        )
