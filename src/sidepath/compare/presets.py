"""Comparisons of the LoRA paper, made to fit the base at hand (Hu et al., 2021).

`which-matrices`: Table 5, one budget over the matrices of attention; `which-rank`: Table 6;
`latency`: Table 1, adapters beside merged LoRA. Each gives `[[method]]` tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from sidepath.errors import UnsupportedModule
from sidepath.injection.architecture import attention_matrices
from sidepath.injection.surgery import remove
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject

Table = dict[str, Any]
RANK = 8
"""Of the first entry of Table 5, which sets the budget: the query matrices alone."""
MATRICES = ("q", "k", "v", "o", "qk", "qv", "qkvo")
RANKS = (1, 2, 4, 8, 64)
RANKED = ("q", "qv", "qkvo")
ADAPTERS = ("Houlsby", "Pfeiffer", "Lin")
SHAPES = ("32x512", "16x256", "1x128")
"""Table 1's batches, in rows and tokens."""


def which_matrices(model: nn.Module) -> list[Table]:
    """LoRA at one number of trained parameters, spent on other matrices of attention each time.

    The paper's matrices are all square, so that halving the rank doubles their number. Here each
    matrix gets the rank that brings the sum nearest to the budget, as even as can be.
    """
    names = _attention(model)
    cost = {one: _parameters(model, LoRA(r=1, targets=(names[one],))) for one in names}
    budget = RANK * cost["q"]
    found = []
    for chosen in MATRICES:
        ranks = _ranks(
            [cost[one] for one in chosen], budget, even=any(":" in names[one] for one in chosen)
        )
        r = max(ranks)
        others = {names[one]: rank for one, rank in zip(chosen, ranks, strict=True) if rank != r}
        told = ",".join(f"{one}:{rank}" for one, rank in zip(chosen, ranks, strict=True))
        table: Table = {"name": "lora", "label": f"lora {told}", "r": r}
        table["targets"] = joined([names[one] for one in chosen])
        found.append({**table, **({"rank_pattern": others} if others else {})})
    return found


def which_rank(model: nn.Module) -> list[Table]:
    """LoRA of ranks 1 to 64 on three choices of attention's matrices."""
    names = _attention(model)
    return [
        {
            "name": "lora",
            "label": f"lora {','.join(chosen)} r={rank}",
            "r": rank,
            "targets": joined([names[one] for one in chosen]),
        }
        for chosen in RANKED
        for rank in RANKS
    ]


def latency(model: nn.Module) -> list[Table]:
    """LoRA, and the adapters of inner layers beside it; only their latency is measured."""
    return [
        {"name": "lora", "r": RANK},
        *(
            {"name": "bottleneck", "label": f"adapter {paper}", "kind": paper.lower()}
            for paper in ADAPTERS
        ),
    ]


PRESETS: Mapping[str, Callable[[nn.Module], list[Table]]] = {
    "which-matrices": which_matrices,
    "which-rank": which_rank,
    "latency": latency,
}


def joined(patterns: Sequence[str]) -> list[str]:
    """Targets with the parts of one fused projection in one: `c_attn:q,v`."""
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        name, _, part = pattern.partition(":")
        found.setdefault(name, []).extend([part] if part else [])
    return [f"{name}:{','.join(parts)}" if parts else name for name, parts in found.items()]


def _attention(model: nn.Module) -> Mapping[str, str]:
    names = attention_matrices(model)
    if names is None:
        raise UnsupportedModule(
            "the preset does not know which matrices of this base are attention's",
            found=type(model).__name__,
            hint="write the entrants as [[method]] tables with their targets",
        )
    return names


def _parameters(model: nn.Module, config: LoRA) -> int:
    adapter = inject(model, config, "counted")
    count = sum(parameter.numel() for parameter in adapter.parameters())
    remove(model, "counted")
    return count


def _ranks(costs: Sequence[int], budget: int, *, even: bool) -> tuple[int, ...]:
    """A rank for each matrix: the sum of rank x cost nearest to the budget, then the most even.

    `even` where the parts of one projection cannot have ranks of their own.
    """
    about = budget / sum(costs)
    near = [rank for rank in range(int(about) - 1, int(about) + 3) if rank >= 1] or [1]
    choices = (
        [(rank,) * len(costs) for rank in near]
        if even
        else itertools.product(near, repeat=len(costs))
    )
    return min(
        choices,
        key=lambda ranks: (
            abs(sum(r * cost for r, cost in zip(ranks, costs, strict=True)) - budget),
            max(ranks) - min(ranks),
            [-rank for rank in ranks],
        ),
    )
