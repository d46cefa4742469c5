"""Watching a run: the loss of every step, and at every so many what each place has become.

Nothing here takes part in a step's arithmetic: the weights have the same bits watched or not.

Dimensions: L places, N places of one shape, S watched steps, O rows, I columns, R and r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sidepath.kernels.spectra import Thin, effective_rank, gram_singular_values, grams
from sidepath.training.history import History, LayerHistory
from sidepath.training.trained import Trained

_DIGITS = 6
"""Significant digits that are kept of what was watched: it is held in float32."""


class Watch:
    """The history of a run as it comes to be; all of it goes into a checkpoint."""

    def __init__(self, trained: Trained, every: int) -> None:
        self.every = every
        """Steps between two looks; 0: never."""
        self._trained = trained
        self._loss: list[float] = []
        self._held_out: list[tuple[int, float]] = []
        self._steps: list[int] = []
        self._looks: list[Tensor] = []
        """Effective rank, norm of B and gradient norm (3, L) of each watched step."""
        self._gradients_L: Tensor | None = None

    def see_gradients(self, step: int) -> None:
        """Step `step` (from 1) has these gradients: summed over processes, not yet clipped."""
        if self.every and step % self.every == 0:
            self._gradients_L = _gradient_norms(self._trained)

    def see_step(self, step: int, loss: float) -> None:
        """Step `step` is done; its loss was this."""
        if not self.every:
            return
        self._loss.append(loss)
        if self._gradients_L is not None:
            self._steps.append(step)
            self._looks.append(torch.stack([*_thin_figures(self._trained), self._gradients_L]))
            self._gradients_L = None

    def see_held_out(self, step: int, loss: float) -> None:
        """The held-out loss after step `step`."""
        if self.every:
            self._held_out.append((step, loss))

    def history(self) -> History:
        """All that was seen so far."""
        looks_S3L = [look.tolist() for look in self._looks]
        layers = []
        for place, name in enumerate(self._trained.groups):
            rank, b_norm, gradient = (
                tuple(_short(look[row][place]) for look in looks_S3L) for row in range(3)
            )
            thin = _thin_of(self._trained, name) is not None
            layers.append(
                LayerHistory(name, rank if thin else None, b_norm if thin else None, gradient)
            )
        return History(
            self.every, tuple(self._loss), tuple(self._held_out), tuple(self._steps), tuple(layers)
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it; nothing for a run that is not watched."""
        if not self.every:
            return {}
        empty = torch.zeros(0, 3, len(self._trained.groups))
        return {
            "loss": torch.tensor(self._loss, dtype=torch.float64),
            "held_out": torch.tensor(self._held_out, dtype=torch.float64).reshape(-1, 2),
            "steps": torch.tensor(self._steps, dtype=torch.int64),
            "looks": torch.stack(self._looks) if self._looks else empty,
        }

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`, in place. Errors: `KeyError` for one that is missing."""
        if self.every:
            self._loss = tensors["loss"].tolist()
            self._held_out = [(int(step), loss) for step, loss in tensors["held_out"].tolist()]
            self._steps = tensors["steps"].tolist()
            self._looks = list(tensors["looks"])


def _short(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


@torch.no_grad()
def _gradient_norms(trained: Trained) -> Tensor:
    """The gradient's L2 norm of each place, (L,) in float32 on the CPU."""
    found, places = [], []
    for place, parameters in enumerate(trained.groups.values()):
        for parameter in parameters:
            if parameter.grad is not None:
                wide = torch.promote_types(parameter.grad.dtype, torch.float32)
                found.append(torch.linalg.vector_norm(parameter.grad, dtype=wide))
                places.append(place)
    squares_L = torch.zeros(len(trained.groups), dtype=torch.float64)
    if found:
        norms = _stacked(found).to("cpu", torch.float64)
        squares_L.index_add_(0, torch.tensor(places), norms * norms)
    return squares_L.sqrt().float()


@torch.no_grad()
def _thin_figures(trained: Trained) -> tuple[Tensor, Tensor]:
    """The effective rank and the norm of B of each place, (L,) in float32 on the CPU; NaN where
    there are no thin factors.

    Factors of one rank go through the small decompositions together: what a look costs is the
    number of shapes and ranks, not of layers.
    """
    ranks_L, norms_L = torch.full((2, len(trained.groups)), torch.nan)
    by_rank: dict[int, list[_Grams]] = {}
    for one in _grams_of(trained):
        by_rank.setdefault(one.A_NRR.shape[-1], []).append(one)
    for found in by_rank.values():
        places = [place for one in found for place in one.places]
        B_NRR = torch.cat([one.B_NRR for one in found])
        sigma_NR = gram_singular_values(torch.cat([one.A_NRR for one in found]), B_NRR)
        ranks_L[places] = effective_rank(sigma_NR).float()
        norms_L[places] = B_NRR.diagonal(dim1=1, dim2=2).sum(-1).sqrt().float()
    return ranks_L, norms_L


class _Grams(NamedTuple):
    """`A Aᵀ` and `Bᵀ B` (N, R, R) on the CPU, of places whose factors have one shape."""

    places: list[int]
    A_NRR: Tensor
    B_NRR: Tensor


def _grams_of(trained: Trained) -> Iterator[_Grams]:
    alike: dict[Any, list[tuple[int, Thin]]] = {}
    for place, name in enumerate(trained.groups):
        thin = _thin_of(trained, name)
        if thin is not None:
            A_RI, B_Or, sizes = thin
            shape = (A_RI.shape, B_Or.shape, sizes, A_RI.dtype, A_RI.device)
            alike.setdefault(shape, []).append((place, thin))
    for found in alike.values():
        A_NRI = torch.stack([thin.A_RI for _, thin in found])
        B_NOr = torch.stack([thin.B_Or for _, thin in found])
        A_NRR, B_NRR = grams(A_NRI, B_NOr, found[0][1].sizes)
        yield _Grams([place for place, _ in found], A_NRR.cpu(), B_NRR.cpu())


def _thin_of(trained: Trained, name: str) -> Thin | None:
    delta = None if trained.adapter is None else trained.adapter.deltas.get(name)
    return None if delta is None else delta.thin()


def _stacked(scalars: list[Tensor]) -> Tensor:
    """Scalars of any device and dtype in one tensor, on the first one's device."""
    device = scalars[0].device
    return torch.stack([scalar.to(device, torch.float64) for scalar in scalars])
