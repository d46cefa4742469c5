"""AdapterFusion: attention over frozen adapters that stand on the model (Pfeiffer et al., 2021).

Dimensions: `...` any leading, D width of the residual stream, N adapters.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.config import check, require
from sidepath.core.adapted import CHILD, SidePaths
from sidepath.core.delta import Delta
from sidepath.core.views import View
from sidepath.errors import AdapterError, UnknownAdapter
from sidepath.methods.base import (
    AllSaved,
    Dtype,
    Method,
    Saved,
    Selection,
    Site,
    Views,
    dtype_of,
    filled,
)
from sidepath.methods.bottleneck import (
    AdapterLayer,
    StreamDelta,
    device_of,
    stream_width,
)

DIGEST = 32
"""Bytes of a SHA-256."""

LOAD_FIRST = (
    "load each onto this base first, under its name: sidepath.load(model, folder, name), "
    "or --beside NAME=FOLDER of train, eval and generate (a fusion cannot be merged)"
)


@dataclass(frozen=True)
class AdapterFusion(Method):
    """`y + sum_n softmax_n(q(y) k(z_n)) V z_n`, where `z_n` is what adapter n adds to `y`.

    Trained are q, k and V of each place, `3 D² + 2 D` parameters; the adapters get no gradient.
    They must be on the model before the fusion is injected or loaded. What is saved names them and
    holds, for each place, the SHA-256 of each adapter that stood there: a fusion loads only beside
    the same adapters under the same names, to the bit, and on the same base. One removed later
    leaves the fusion without an answer (`UnknownAdapter`).
    """

    method = "fusion"

    adapters: tuple[str, ...] = ()
    """The bottleneck adapters that are composed, by the names they are loaded under; when none is
    named, all that stand at the fusion's places when it is injected."""
    targets: tuple[str, ...] = ("mlp-output",)
    """Where they stand: mlp-output for pfeiffer and lin adapters; attention-output and mlp-output
    for houlsby; mlp-module for parallel ones. What they have elsewhere stays silent."""
    drop: int = 0
    """No fusion in the first so many blocks, for adapters that are dropped there."""
    regularise: float = 0.01
    """Weight in the loss of `‖V - 1‖²` (Frobenius) of each place, so that V stays near the
    identity (the authors' code); `sidepath train` heeds it, and reports the loss of the data."""
    dtype: Dtype = "float32"
    """Data type of what is trained; `base` takes that of the module it stands beside."""
    train_whole: tuple[str, ...] = ()
    """Modules trained whole in a copy of the fusion's own, such as a classification head."""

    def __post_init__(self) -> None:
        check(self)
        rules = {
            "adapters": len({*self.adapters}) == len(self.adapters),
            "targets": bool(self.targets),
            "drop": self.drop >= 0,
            "regularise": 0 <= self.regularise <= 1e6,
        }
        require(self, rules)

    def selection(self) -> Selection:
        blocks = (self.drop or None, None)
        return Selection(self.targets, blocks=blocks, train_whole=self.train_whole)

    def completed(self, views: Iterable[View]) -> Method:
        """Where no adapters are named: with every bottleneck that stands at any of the places."""
        if self.adapters:
            return self
        found = [
            name
            for view in views
            for name in names_beside(view)
            if isinstance(beside(view, name), AdapterLayer)
        ]
        return dataclasses.replace(self, adapters=tuple(dict.fromkeys(found)))

    def deltas(
        self, sites: Iterable[Site], views: Views, tensors: AllSaved = None
    ) -> dict[str, Delta]:
        """As for every method. Errors: one `AdapterError` with every adapter that is amiss."""
        sites = list(sites)
        places = [site.path for site in sites if site.kind in ("dense", "module")]
        # A plan's twin has shapes alone and no adapters: there is nothing to hold them against.
        if not all(_imagined(views[path]) for path in places):
            saved = {path: (tensors or {}).get(path, {}).get("composed") for path in places}
            self._check(places, views, saved)
        return super().deltas(sites, views, tensors)

    def _check(
        self, places: Sequence[str], views: Views, saved: Mapping[str, Tensor | None]
    ) -> None:
        if not self.adapters:
            raise AdapterError(
                "no bottleneck adapter stands where the fusion acts",
                where=", ".join(self.targets),
                hint=LOAD_FIRST,
            )
        faults = []
        for number, name in enumerate(self.adapters):
            layers = {path: beside(views[path], name) for path in places}
            if not any(layers.values()):
                faults.append(f'"{name}": stands at none of the {len(places)} places')
                continue
            for path, layer in layers.items():
                composed = saved[path]
                if layer is None:
                    faults.append(f'"{name}": not beside {path}')
                elif not isinstance(layer, AdapterLayer):
                    faults.append(
                        f'"{name}": {type(layer).__name__} beside {path} is no bottleneck'
                    )
                elif composed is not None and not torch.equal(
                    composed[number].cpu(), digest_of(layer)
                ):
                    faults.append(f'"{name}": beside {path} is not the one that was composed')
        if faults:
            raise AdapterError(
                "the fusion cannot compose these adapters",
                expected=f"bottleneck adapters {', '.join(self.adapters)} "
                f"at {', '.join(self.targets)}",
                faults=faults,
                hint=LOAD_FIRST,
            )

    def module_delta(self, site: Site, view: View, tensors: Saved = None) -> Delta:
        dtype = dtype_of(self.dtype, view)
        return filled(lambda: Fusion(view, self.adapters, dtype, self.regularise), tensors)


class Fusion(StreamDelta):
    """`y + sum_n a_n V z_n`, `a = softmax_n((Q y + b_Q) · (K z_n + b_K))`, beside one module.

    `query`, `key` and `value` are (D, D), with biases (D) for the first two. Q and K start
    N(0, 0.02²); V at the identity with 1e-6 beside the diagonal, so that a fresh fusion is near a
    weighted mean of its adapters. `composed (N, 32)` holds the bytes of each adapter's SHA-256.
    """

    names: tuple[str, ...]
    composed: Tensor

    def __init__(
        self, view: View, names: tuple[str, ...], dtype: torch.dtype, regularise: float
    ) -> None:
        super().__init__()
        self.names, self.regularise = names, regularise
        device, width = device_of(view), stream_width(view)
        value = torch.full((width, width), 1e-6, dtype=dtype, device=device).fill_diagonal_(1.0)
        self.query = nn.Parameter(torch.empty_like(value).normal_(std=0.02))
        self.query_bias = nn.Parameter(torch.zeros(width, dtype=dtype, device=device))
        self.key = nn.Parameter(torch.empty_like(value).normal_(std=0.02))
        self.key_bias = nn.Parameter(torch.zeros(width, dtype=dtype, device=device))
        self.value = nn.Parameter(value)
        layers = [] if _imagined(view) else [beside(view, name) for name in names]
        digests = [digest_of(layer) for layer in layers if isinstance(layer, AdapterLayer)]
        composed = torch.stack(digests) if digests else torch.zeros(len(names), DIGEST)
        self.register_buffer("composed", composed)

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        standing = [beside(base, name) for name in self.names]
        layers = [layer for layer in standing if isinstance(layer, AdapterLayer)]
        if not layers or len(layers) < len(self.names):  # none at all: in a plan's twin
            raise UnknownAdapter(
                "an adapter that the fusion composes is not on the model any more",
                found=", ".join(names_beside(base)),
                expected=", ".join(self.names),
                hint="load it again under this name",
            )
        added = [layer.update(x if layer.parallel else y, frozen=True) for layer in layers]
        z = torch.stack([z_n.to(self.value.dtype) for z_n in added], dim=-2)
        return y + self.composition(y.to(z.dtype), z).to(y.dtype)

    def composition(self, h: Tensor, z: Tensor) -> Tensor:
        """`sum_n a_n V z_n (..., D)` for the output `h (..., D)` and updates `z (..., N, D)`."""
        query = F.linear(h, self.query, self.query_bias)
        key = F.linear(z, self.key, self.key_bias)
        weights = (query.unsqueeze(-2) * key).sum(-1).softmax(-1)
        return (weights.unsqueeze(-1) * F.linear(z, self.value)).sum(-2)

    def penalty(self) -> Tensor | None:
        if not self.regularise:
            return None
        identity = torch.eye(len(self.value), dtype=self.value.dtype, device=self.value.device)
        return self.regularise * (self.value - identity).square().sum()

    def tensors(self) -> dict[str, Tensor]:
        """What is trained, and the digests of what it was trained over."""
        return {**super().tensors(), "composed": self.composed}


def beside(view: View, name: str) -> Delta | None:
    """What the adapter of that name has beside a view's module."""
    side = view.module._modules.get(CHILD)
    return side.get(name) if isinstance(side, SidePaths) else None


def names_beside(view: View) -> list[str]:
    """The adapters that have something beside a view's module, in the order they came."""
    side = view.module._modules.get(CHILD)
    return side.names() if isinstance(side, SidePaths) else []


def digest_of(layer: AdapterLayer) -> Tensor:
    """SHA-256 of one adapter at one place, settings and numbers, as 32 floats (0 to 255)."""
    settings = (layer.size, layer.activation, layer.scale, layer.parallel)
    hashed = hashlib.sha256(repr(settings).encode())
    for name, tensor in layer.tensors().items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().view(torch.uint8)
        hashed.update(plain.numpy().tobytes())
    return torch.tensor(list(hashed.digest()), dtype=torch.float32)


def _imagined(view: View) -> bool:
    """Whether a module has shapes and no memory."""
    from torch._subclasses.fake_tensor import FakeTensor

    return any(p.is_meta or isinstance(p, FakeTensor) for p in view.module.parameters())
