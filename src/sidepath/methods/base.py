"""What every method of adaptation declares: where it acts, and the delta it puts there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

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
    def dense_delta(
        self, site: Site, view: DenseView, tensors: Mapping[str, Tensor] | None = None
    ) -> Delta:
        """The delta of a matrix: drawn from torch's random state, or made of its `tensors`."""

    def delta(self, site: Site, view: View, tensors: Mapping[str, Tensor] | None = None) -> Delta:
        """The delta for a site, on the device of the module it stands beside.

        Fresh, or made of `tensors` (those that `Delta.tensors` names, in its shapes; a bias that
        is left out is the module's own): then nothing random is drawn, and a tensor that has the
        right dtype and device is kept, not copied.
        """
        if site.kind == "dense":
            assert isinstance(view, DenseView)
            return self.dense_delta(site, view, tensors)
        delta = Whole(view) if site.kind == "whole" else BiasOnly(view)
        if tensors is not None:
            delta.take_(tensors)
        return delta
