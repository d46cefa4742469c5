"""Training in a random subspace of all parameters: how few numbers does a task take?

Dimensions: D parameters of the base, d trained numbers, m of them scales of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sidepath.config import check, require
from sidepath.core.delta import Delta, accumulation_dtype
from sidepath.core.views import View
from sidepath.errors import ConfigError
from sidepath.kernels.hadamard import Fastfood
from sidepath.kernels.hashed import seed_of
from sidepath.methods.base import AllSaved, Method, Selection, Site, Views
from sidepath.methods.own import InPlaceOf, held_by

THETA, SCALES = "theta", "scales"
"""The adapter's parameters: the vector all modules share, and with SAID the layers' scales."""


@dataclass(frozen=True)
class IntrinsicDimension(Method):
    """All of the base moves, in a random subspace of few dimensions (Li et al., 2018).

    `did`: `θ_D = θ_D0 + P θ_d` with a vector `θ_d (d,)` that starts at zero; the D x d matrix `P`
    (Fastfood, columns of length 1 on average) follows from `seed` and is never made nor saved.
    `said` (Aghajanyan et al., 2020, section 3): `θ_Di = θ_D0i + λ_i (P θ_(d-m))_i` for each layer
    i, with a scale `λ_i` that starts at 1; the m scales are among the d. A layer is a repeated
    block, or what stands side by side outside of the blocks. The new weights are computed in each
    forward pass: merge the adapter, or switch gradients off (they are kept then), to answer fast.
    """

    method = "intrinsic"

    d: int = 1000
    """Trained numbers, heads that are trained whole not counted; with `said` the layers' scales
    are among them."""
    kind: Literal["did", "said"] = "said"
    """One projection into all parameters, or one with a trained scale for each layer (said)."""
    seed: int = 0
    """Seed of the projection."""
    train_whole: tuple[str, ...] = ()
    """Modules trained whole beside the subspace, such as a classification head."""

    def __post_init__(self) -> None:
        check(self)
        require(self, {"d": self.d >= 1, "seed": self.seed >= 0})

    def selection(self) -> Selection:
        return Selection((), own=True, train_whole=self.train_whole)

    def deltas(
        self, sites: Iterable[Site], views: Views, tensors: AllSaved = None
    ) -> dict[str, Delta]:
        """As `Method.deltas`: the first module's delta owns what is trained, the others borrow it.

        Errors: `ConfigError` where d is more than the parameters, or no more than the scales.
        """
        sites = list(sites)
        inside = [site.path for site in sites if site.kind == "own"]
        space = Space.over(self, {path: views[path].module for path in inside})
        found: dict[str, Delta] = {}
        for site in sites:
            own = None if tensors is None else tensors.get(site.path, {})
            if site.kind == "own":
                found[site.path] = Subspace(views[site.path], space)
                if own:
                    found[site.path].take_(own)
            else:
                found[site.path] = self.delta(site, views[site.path], own)
        return found


class Space:
    """The subspace of one adapter: its trained numbers, and its projection into each parameter."""

    def __init__(self, theta: nn.Parameter, scales: nn.Parameter | None) -> None:
        self.theta = theta
        self.scales = scales
        self.parts: dict[nn.Parameter, tuple[Fastfood, int]] = {}
        """The part of `P` and the scale's number, by the base's parameter: one that several
        modules hold is of the first one's layer, and moves as one."""
        self.owned = False
        """Whether a delta has taken the trained numbers as its own."""

    @classmethod
    def over(cls, config: IntrinsicDimension, modules: Mapping[str, nn.Module]) -> Space:
        """The space of everything that these modules hold, by path, themselves."""
        names: dict[nn.Parameter, str] = {}
        for path, module in modules.items():
            for local, one in held_by(module).items():
                names.setdefault(one.parameter, f"{path}.{local}")
        layers = _numbered(layer_of(name.rpartition(".")[0]) for name in names.values())
        total = sum(held.numel() for held in names)
        m = len(layers) if config.kind == "said" else 0
        _require_room(config, m, total)
        wide = any(held.dtype == torch.float64 for held in names)
        device = next(iter(names)).device
        dtype = torch.float64 if wide else torch.float32
        theta = nn.Parameter(torch.zeros(config.d - m, dtype=dtype, device=device))
        scales = nn.Parameter(torch.ones(m, dtype=dtype, device=device)) if m else None
        space = cls(theta, scales)
        for held, name in names.items():
            seed = seed_of("intrinsic", config.seed, name)
            part = Fastfood(seed, config.d - m, held.numel(), total)
            space.parts[held] = (part, layers[layer_of(name.rpartition(".")[0])])
        return space


class Subspace(InPlaceOf):
    """A module's own parameters, moved by their part of `P θ`."""

    parts: dict[str, tuple[Fastfood, int]]
    """The part of `P` and the scale's number, by the name of the parameter."""
    kept: tuple[object, Mapping[str, Tensor]] | None
    """While gradients are off: the weights, and what they were computed from."""

    def __init__(self, view: View, space: Space) -> None:
        super().__init__()
        shared = {THETA: space.theta} | ({} if space.scales is None else {SCALES: space.scales})
        if space.owned:
            self.lent.update(shared)
        else:
            self._parameters.update(shared)
            space.owned = True
        self.__dict__["parts"] = {
            name: space.parts[held.parameter] for name, held in held_by(view.module).items()
        }
        self.__dict__["kept"] = None

    def stand_ins(self, base: View) -> Mapping[str, Tensor]:
        """`W0 + λ P θ` for each parameter, rounded once to its dtype."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.__dict__["kept"] = None
            return self._computed(base)
        source = self._source(base)
        if self.kept is None or self.kept[0] != source:
            self.__dict__["kept"] = (source, self._computed(base))
        assert self.kept is not None
        return self.kept[1]

    def folded(self, base: View, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self._computed(base).items()}

    def _computed(self, base: View) -> dict[str, Tensor]:
        trained = self.trained()
        moved, held = {}, held_by(base.module)
        for name, (projection, layer) in self.parts.items():
            x_d: Tensor = trained[THETA]
            if SCALES in trained:  # P is linear: λ P θ = P (λ θ), and λ's gradient keeps no P θ
                x_d = x_d * trained[SCALES][layer]
            moved[name] = _moved(held[name].parameter, x_d, projection)
        return moved

    def _source(self, base: View) -> object:
        """Everything the weights follow from; a change of any number changes it."""
        held = [held.parameter for held in held_by(base.module).values()]
        return [(t.data_ptr(), t._version, t.dtype) for t in (*self.trained().values(), *held)]


def _moved(W0: Tensor, x_d: Tensor, projection: Fastfood) -> Tensor:
    dtype = accumulation_dtype(W0.dtype)
    update = projection(x_d.to(device=W0.device, dtype=dtype)).view(W0.shape)
    return (W0.to(dtype) + update).to(W0.dtype)


def layer_of(path: str) -> str:
    """The layer a module belongs to: its repeated block, or the module around it.

    `encoder.layer.3.output.dense` is of `encoder.layer.3`, `embeddings.norm` of `embeddings`.
    """
    words = path.split(".")
    number = next((index for index, word in enumerate(words) if word.isdigit()), None)
    return ".".join(words[:-1] if number is None else words[: number + 1])


def _numbered(layers: Iterable[str]) -> dict[str, int]:
    return {layer: number for number, layer in enumerate(dict.fromkeys(layers))}


def _require_room(config: IntrinsicDimension, m: int, total: int) -> None:
    if m < config.d <= total:
        return
    raise ConfigError(
        "the subspace has an impossible number of dimensions",
        found=f"d = {config.d}",
        expected=f"more than {m}, one for each layer's scale, and at most {total}"
        if m
        else f"at most {total}, the parameters of the base",
        hint='kind="did" trains no scales' if config.d <= m else None,
    )
