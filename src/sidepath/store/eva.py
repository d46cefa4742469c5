"""EVA: A starts at the directions in which a layer's inputs vary most, and the ranks go where
they explain most (Paischer et al., 2024, section 3).

Dimensions: N rows seen, I in, K directions kept, R rank.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.core.delta import accumulation_dtype
from sidepath.core.views import LinearView, view_of
from sidepath.errors import ConfigError, UnsupportedModule
from sidepath.injection.registry import check_name, registry_of
from sidepath.injection.surgery import disabled, refuse_merged
from sidepath.injection.targets import resolve
from sidepath.methods.lora import LoRA, by_path
from sidepath.methods.lowrank import LowRank
from sidepath.store.adapter import Adapter, inject


class Directions:
    """The largest singular directions of rows that come in pieces (Ross et al., 2008, no mean)."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.seen = 0
        """Rows so far."""
        self.total = 0.0
        """The sum of all rows' squares, whatever was kept of them."""
        self.scaled_KI: Tensor | None = None
        """`S V'` of what was kept."""

    def add(self, x_NI: Tensor) -> None:
        """See more rows: the factors of what was kept and of these, cut to `kept` again. In place.

        Exact as long as all rows lie in a space of `kept` dimensions, or come at once.
        """
        x_NI = x_NI.to(accumulation_dtype(x_NI.dtype))
        self.seen += len(x_NI)
        self.total += float(x_NI.square().sum())
        stacked = x_NI if self.scaled_KI is None else torch.cat([self.scaled_KI, x_NI])
        _, S, V = torch.linalg.svd(stacked, full_matrices=False)
        self.scaled_KI = S[: self.kept, None] * V[: self.kept]

    def explained(self) -> list[float]:
        """Each direction's share of the sum of squares, the largest first."""
        if self.scaled_KI is None or not self.total:
            return []
        shares: list[float] = (self.scaled_KI.square().sum(1) / self.total).tolist()
        return shares

    def first(self, r: int) -> Tensor:
        """The first r directions as orthonormal rows (R, I)."""
        assert self.scaled_KI is not None
        _, _, V = torch.linalg.svd(self.scaled_KI, full_matrices=False)
        rows: Tensor = V[:r]
        return rows


def spread_ranks(explained: Mapping[str, list[float]], budget: int) -> dict[str, int]:
    """How many of `budget` ranks each layer gets: the directions that explain most, over all.

    Between equal shares the layer named first goes first. A layer may get none.
    """
    every = [
        (-share, order, path)
        for order, (path, shares) in enumerate(explained.items())
        for share in shares
        if share > 0
    ]
    ranks = dict.fromkeys(explained, 0)
    for _, _, path in sorted(every)[:budget]:
        ranks[path] += 1
    return ranks


def inject_eva(
    model: nn.Module,
    config: LoRA,
    batches: Iterable[Mapping[str, Any]],
    name: str = "default",
    *,
    rho: float = 2.0,
) -> Adapter:
    """`inject` a LoRA whose A starts at the inputs of a few batches and whose ranks follow them.

    `batches`: keyword arguments of the model's forward pass; rows that an `attention_mask` marks
    as padding are left out. For each target the singular directions of its inputs are found piece
    by piece; of all layers' directions the `r * layers` that explain most of their layer's sum of
    squares are kept, at most `round(rho * r)` a layer (`rho` 1: r everywhere). A starts at them,
    its rows orthonormal, and B at zero, so the outputs stay what they were. A layer's scaling
    stays that of rank r. Layers that get no rank are left out. The base is run without gradients,
    in evaluation mode, its other adapters silent. Changes `model` in place, as `inject` does.

    Errors: `ConfigError` for settings that name ranks or starts of their own, for no batch, and
    for layers that saw fewer rows than directions are wanted; `UnsupportedModule` for targets that
    are no linear layers; and what `inject` raises.
    """
    check_name(registry_of(model), name)
    refuse_merged(registry_of(model), f'"{name}" cannot be injected')
    wanted = max(1, round(rho * config.r))
    _require_free(config, rho)
    paths = [site.path for site in resolve(model, config) if site.kind == "dense"]
    found = {path: Directions(wanted) for path in paths}
    _observe(model, found, batches)
    _require_enough(found, wanted)
    ranks = spread_ranks({path: d.explained() for path, d in found.items()}, config.r * len(paths))
    adapter = inject(model, _with_ranks(config, ranks), name)
    for path, delta in adapter.deltas.items():
        if isinstance(delta, LowRank):
            A_RI = found[path].first(ranks[path])
            with torch.no_grad():
                delta.A.copy_(A_RI.repeat(max(1, len(delta.parts)), 1))
    return adapter


def _require_free(config: LoRA, rho: float) -> None:
    faults = [
        f"{field}: {why}"
        for field, why, broken in (
            ("rho", f"{rho}, expected at least 1", not rho >= 1),
            ("rank_pattern", "EVA sets the ranks", bool(config.rank_pattern)),
            ("alpha_pattern", "EVA sets the alphas", bool(config.alpha_pattern)),
            ("start", f"{config.start}, and EVA is a start", config.start != "kaiming"),
            ("dora", "not with EVA", config.dora),
        )
        if broken
    ]
    if faults:
        raise ConfigError("these settings leave EVA nothing to choose", faults=faults)


def _require_enough(found: Mapping[str, Directions], wanted: int) -> None:
    few = [f"{path}: {one.seen} rows" for path, one in found.items() if one.seen < wanted]
    if few:
        raise ConfigError(
            f"EVA needs at least {wanted} rows of input a layer",
            faults=few,
            hint="give more batches, or a smaller r or rho",
        )


def _with_ranks(config: LoRA, ranks: Mapping[str, int]) -> LoRA:
    """The settings with a rank for each path, and the alpha that keeps each one's scaling."""
    power = 1.0 if config.scaling == "alpha/r" else 0.5
    others = {path: rank for path, rank in ranks.items() if rank}
    alphas = {path: config.alpha * (rank / config.r) ** power for path, rank in others.items()}
    return dataclasses.replace(
        config,
        exclude=(*config.exclude, *(glob.escape(path) for path, rank in ranks.items() if not rank)),
        rank_pattern=by_path(others),
        alpha_pattern=by_path(alphas),
    )


def _observe(
    model: nn.Module, found: Mapping[str, Directions], batches: Iterable[Mapping[str, Any]]
) -> None:
    """Run the base on the batches and show each layer's inputs to its directions."""
    modules = {path: model.get_submodule(path) for path in found}
    wrong = [
        f"{path}: {type(module).__name__}"
        for path, module in modules.items()
        if not isinstance(view_of(module), LinearView)
    ]
    if wrong:
        raise UnsupportedModule("EVA starts linear layers alone", faults=wrong)
    mask: list[Tensor | None] = [None]

    def watch(directions: Directions) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            x, real = args[0].detach(), mask[0]
            if real is not None and real.shape == x.shape[:-1]:
                directions.add(x[real.bool()])
            else:
                directions.add(x.flatten(0, -2))

        return see

    handles = [modules[path].register_forward_pre_hook(watch(found[path])) for path in found]
    try:
        with torch.no_grad(), _evaluating(model), disabled(model):
            for batch in batches:
                mask[0] = batch.get("attention_mask")
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
