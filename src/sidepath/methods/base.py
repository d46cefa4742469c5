"""What every method of adaptation declares: where it acts, and the delta it puts there."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sidepath.core.delta import Delta
from sidepath.core.views import DenseView, View
from sidepath.errors import ConfigError, UnsupportedModule
from sidepath.kernels.lowrank import Part
from sidepath.methods.bias import BiasOnly
from sidepath.methods.own import Own, tie
from sidepath.methods.tokens import share
from sidepath.methods.whole import Whole

HEAD = "head"
"""Among modules trained whole: whatever heads the model has."""
Dtype = Literal["float32", "bfloat16", "float16", "base"]
Views = Mapping[str, View]
"""The views of some places by their paths."""
Saved = Mapping[str, Tensor] | None
"""What a loaded delta is made of, by the names of `Delta.tensors`; None: a fresh one is made."""
AllSaved = Mapping[str, Mapping[str, Tensor]] | None
"""The same for all deltas of an adapter, by the paths they stand at."""
SiteKind = Literal["dense", "module", "bias", "whole", "own", "body", "tokens"]


@dataclass(frozen=True)
class Site:
    """One place of a model where an adapter puts a delta."""

    path: str
    """Dotted name of the module."""
    kind: SiteKind
    """A matrix is adapted, or a whole module's output; the bias alone is trained, the module is
    trained whole, or what it holds itself, without its children; the whole call of the model's body
    is changed; or rows for some tokens stand in an embedding or a head."""
    parts: tuple[Part, ...] = ()
    """Rows of a fused projection that are adapted; empty means the whole matrix."""
    pattern: str = ""
    """The target that asked for this place."""


@dataclass(frozen=True)
class Selection:
    """Where a method acts, in the user's terms (see `LoRA` for each field)."""

    targets: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    bias: Literal["none", "all", "lora"] = "none"
    train_whole: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    """Keys of per-pattern settings; each must match an adapted module."""
    own: bool = False
    """Train the parameters that every module holds itself."""
    blocks: tuple[int | None, int | None] = (None, None)
    """Only the blocks of this slice, as Python counts: (-2, None) are the last two."""
    body: bool = False
    """Stand around the call of the model's body."""
    tokens: bool = False
    """Train rows of the token embedding, and of the head."""


class Method(ABC):
    """A method's frozen settings; a dataclass whose fields are the method's own."""

    method: ClassVar[str]
    """The method's name on the command line and in files."""

    @abstractmethod
    def selection(self) -> Selection:
        """Where the method acts."""

    def with_heads(self, heads: Sequence[str]) -> Method:
        """These settings with the task's heads, which no checkpoint filled, trained whole."""
        held: tuple[str, ...] = vars(self)["train_whole"]
        missing = tuple(head for head in heads if head not in held)
        return dataclasses.replace(self, train_whole=(*held, *missing))  # type: ignore[type-var]

    def completed(self, views: Iterable[View]) -> Method:
        """The settings of a fresh adapter at these places: these, with what they leave to the model
        named.
        """
        return self

    def saved(self) -> Method:
        """The settings its saved form is loaded with: these, unless training has another form."""
        return self

    def rate_of(self, delta: Delta, local: str) -> float:
        """The learning rate of one trained tensor, as a multiple of the run's."""
        return 1.0

    def dense_delta(self, site: Site, view: DenseView, tensors: Saved = None) -> Delta:
        """The delta beside a matrix: drawn from torch's random state, or made of its `tensors`.

        Methods that change what any module gives make it as for any module.
        """
        return self.module_delta(site, view, tensors)

    def body_delta(self, view: View, tensors: Saved = None) -> Delta:
        """The delta around the call of the model's body, as `dense_delta` makes one."""
        raise ConfigError(f'"{self.method}" changes no call of a model\'s body')

    def tokens_delta(self, site: Site, view: View, tensors: Saved = None) -> Delta:
        """The delta with rows for some tokens, beside an embedding or a head."""
        raise ConfigError(f'"{self.method}" trains no rows of tokens')

    @property
    def positions(self) -> int:
        """How many positions of the model's context the adapter takes for itself."""
        return 0

    def module_delta(self, site: Site, view: View, tensors: Saved = None) -> Delta:
        """The delta beside a whole module, for methods that change what a module gives."""
        raise UnsupportedModule(
            f"{self.method} stands beside a matrix, and this module is none",
            where=site.path,
            found=type(view.module).__name__,
            hint="name the dense layers inside, where there are such",
        )

    def delta(self, site: Site, view: View, tensors: Saved = None) -> Delta:
        """The delta for a site, on the device of the module it stands beside.

        Fresh, or made of `tensors` (those that `Delta.tensors` names, in its shapes; a bias that
        is left out is the module's own): then nothing random is drawn, and a tensor that has the
        right dtype and device may be kept, not copied.
        """
        if site.kind == "dense":
            assert isinstance(view, DenseView)
            return self.dense_delta(site, view, tensors)
        if site.kind == "body":
            return self.body_delta(view, tensors)
        if site.kind == "tokens":
            return self.tokens_delta(site, view, tensors)
        if site.kind == "module":
            return self.module_delta(site, view, tensors)
        return filled(lambda: _BESIDE[site.kind](view), tensors)

    def deltas(
        self, sites: Iterable[Site], views: Views, tensors: AllSaved = None
    ) -> dict[str, Delta]:
        """The deltas of all sites, by path; `tensors` holds each one's, by path.

        Parameters that are one in the base are one here, in the first delta that has them.
        """
        found: dict[str, Delta] = {}
        for site in sites:
            own = None if tensors is None else tensors.get(site.path, {})
            found[site.path] = self.delta(site, views[site.path], own)
        tie(found, views)
        share(found, views)
        return found


_BESIDE: Mapping[str, Callable[[View], Delta]] = {
    "whole": Whole,
    "bias": BiasOnly,
    "own": Own,
}
"""What stands beside a module for the kinds of site that are the same for every method."""


def dtype_of(setting: Dtype, view: View) -> torch.dtype:
    """The dtype that a setting names; `base`: the one that the module computes in."""
    if setting != "base":
        named: torch.dtype = getattr(torch, setting)
        return named
    if isinstance(view, DenseView):
        return view.dtype
    floating = (p.dtype for p in view.module.parameters() if p.is_floating_point())
    return next(floating, torch.float32)


def filled(make: Callable[[], Delta], tensors: Saved) -> Delta:
    """What `make` makes; with `tensors` these are copied in, and nothing random is drawn."""
    if tensors is None:
        return make()
    with torch.random.fork_rng(devices=[]):
        delta = make()
    delta.take_(tensors)
    return delta
