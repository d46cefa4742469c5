"""Quantised bases on the way to a merged folder: made plain, and what quantising again would do.

Dimensions: O out, I in (floor 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.quant import is_packed, nearest_levels, state_of
from sidepath.core.views import DenseView, view_of
from sidepath.errors import MergeError
from sidepath.injection.architecture import modules_of
from sidepath.injection.places import preset_paths
from sidepath.injection.quantising import dequantise_
from sidepath.injection.registry import require_registry
from sidepath.methods.lowrank import LowRank
from sidepath.store.manifest import Manifest
from sidepath.store.tensors import FLOATING


def recorded_packing(manifests: Mapping[Path, Manifest | None]) -> dict[str, str]:
    """How the base that the adapters were trained over was packed: parameter name to packing.

    Adapters without a manifest say nothing. Errors: `MergeError` when two say different things:
    then no base is the one that both were trained over.
    """
    found: dict[Path, dict[str, str]] = {}
    for folder, manifest in manifests.items():
        if manifest is not None:
            samples = manifest.base.samples.items()
            found[folder] = {name: sample.dtype for name, sample in samples if sample.packed}
    if len({tuple(sorted(packing.items())) for packing in found.values()}) > 1:
        raise MergeError(
            "the adapters were trained over one base at different precisions",
            faults=[
                f"{folder}: {', '.join(sorted(set(packing.values()))) or 'not quantised'}"
                for folder, packing in found.items()
            ],
            hint="merge them one by one, or give a base that is stored quantised",
        )
    return next(iter(found.values()), {})


@torch.no_grad()
def make_plain(model: nn.Module, packing: Mapping[str, str]) -> dict[str, torch.dtype]:
    """Give a base the float32 weights that its 4-bit layers stand for, in place.

    A model whose layers are packed is dequantised. In a plain one the weights that `packing`
    names are packed and unpacked again, so that it computes what the adapter was trained over.
    Returns, for each weight made so, the dtype it was quantised from.
    """
    packed = {
        f"{path}.weight": state_of(module.weight).dtype  # type: ignore[arg-type]
        for path, module in modules_of(model)
        if is_packed(module)
    }
    if packed:
        dequantise_(model)
        return packed
    dtypes = {}
    for name, kind in packing.items():
        quant_type, source, block, nested = kind.split("-")
        view = view_of(model.get_submodule(name.rpartition(".")[0]))
        assert view is not None, "what was packed is a linear layer"
        W_OI = view.matrix().to(FLOATING[source])
        Q_OI = nearest_levels(
            W_OI, quant_type=quant_type.lower(), blocksize=int(block), double=int(nested) > 0
        )
        view.weight.data = view.from_matrix(Q_OI)
        dtypes[name] = FLOATING[source]
    return dtypes


@dataclass(frozen=True)
class Survival:
    """What is left of an update `ΔW` when `W + ΔW` is quantised again, with Q the round trip.

    `share = <Q(W + ΔW) - Q(W), ΔW> / |ΔW|²`: 1 when the whole of it is kept on average, 0 when
    nothing is. `relative_error = |Q(W + ΔW) - Q(W) - ΔW| / |ΔW|`: what comes on top is noise.
    """

    name: str
    along: float
    """`<Q(W + ΔW) - Q(W), ΔW>`"""
    error: float
    """`|Q(W + ΔW) - Q(W) - ΔW|²`"""
    size: float
    """`|ΔW|²`"""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; null where there is no update."""
        return {
            "name": self.name,
            "share": self.along / self.size if self.size else None,
            "relative_error": math.sqrt(self.error / self.size) if self.size else None,
        }


def survival(
    name: str, W_OI: Tensor, change_OI: Tensor, quantise: Callable[[Tensor], Tensor]
) -> Survival:
    """Measure one layer. `quantise` gives the dequantised matrix; sums are in float64."""
    kept_OI = (quantise(W_OI + change_OI) - quantise(W_OI)).double()
    change_OI = change_OI.double()
    return Survival(
        name,
        along=float((kept_OI * change_OI).sum()),
        error=float((kept_OI - change_OI).square().sum()),
        size=float(change_OI.square().sum()),
    )


@torch.no_grad()
def survivals(
    model: nn.Module, adapter: str, quant_type: str, stored: Mapping[str, torch.dtype]
) -> list[Survival]:
    """For each layer of the body that the adapter changes, what quantising again would leave.

    Quantised as `--quantise` does while loading: blocks of 64, scales quantised too, from the
    dtype that the merged weight is stored in (`stored`, by parameter name).
    """
    registry = require_registry(model)
    body = set(preset_paths(model, "all-linear"))
    found = []
    for path, delta in registry.adapter(adapter).deltas.items():
        view = registry.sides[path].view
        if path in body and isinstance(delta, LowRank) and isinstance(view, DenseView):
            dtype = stored[f"{path}.weight"]

            def quantise(W_OI: Tensor, dtype: torch.dtype = dtype) -> Tensor:
                return nearest_levels(W_OI.to(dtype), quant_type=quant_type)

            W_OI = view.matrix().float()
            change_OI = delta.matrix(W_OI.shape[0], torch.float32)
            found.append(survival(path, W_OI, change_OI, quantise))
    return found


def together(layers: Iterable[Survival]) -> dict[str, Any]:
    """All layers as one, with each of them: the JSON document's `requantised`."""
    layers = list(layers)
    whole = Survival(
        "all",
        along=math.fsum(layer.along for layer in layers),
        error=math.fsum(layer.error for layer in layers),
        size=math.fsum(layer.size for layer in layers),
    )
    values = whole.as_dict()
    del values["name"]
    return {**values, "layers": [layer.as_dict() for layer in layers]}
