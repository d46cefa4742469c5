"""What every method of adaptation declares: where it acts, and the delta it puts there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from sidepath.core.delta import Delta
from sidepath.core.views import DenseView, View
from sidepath.kernels.lowrank import Part
from sidepath.methods.bias import BiasOnly
from sidepath.methods.whole import Whole

SiteKind = Literal["dense", "bias", "whole"]


@dataclass(frozen=True)
class Site:
    """One place of a model where an adapter puts a delta."""

    path: str
    """Dotted name of the module."""
    kind: SiteKind
    """A matrix is adapted, the bias alone is trained, or the module is trained whole."""
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


class Method(ABC):
    """A method's frozen settings; a dataclass whose fields are the method's own."""

    method: ClassVar[str]
    """The method's name on the command line and in files."""

    @abstractmethod
    def selection(self) -> Selection:
        """Where the method acts."""

    @abstractmethod
    def dense_delta(self, site: Site, view: DenseView) -> Delta:
        """The fresh delta of a matrix; drawn from torch's random state."""

    def delta(self, site: Site, view: View) -> Delta:
        """The fresh delta for a site, on the device of the module it stands beside."""
        if site.kind == "whole":
            return Whole(view)
        if site.kind == "bias":
            return BiasOnly(view)
        assert isinstance(view, DenseView)
        return self.dense_delta(site, view)
