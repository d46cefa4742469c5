"""The presets: Table 5's rows at one budget, Table 6's, on bases of several kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sidepath.compare.entrants import entrants_of
from sidepath.compare.presets import MATRICES, PRESETS, RANKED, RANKS, joined, which_matrices
from sidepath.errors import UnsupportedModule
from sidepath.injection.surgery import remove
from sidepath.store.adapter import inject
from tests.conftest import Vision, tiny_bert, tiny_gpt2, tiny_llama

from .kit import TinyBases


def square() -> Any:
    """Attention without groups: every matrix as large as the others, as in the paper."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=16,
        )
    )


def trained(model: nn.Module) -> dict[str, int]:
    found = {}
    entrants, faults = entrants_of(which_matrices(model), [1e-3])
    assert not faults
    for entrant in entrants:
        adapter = inject(model, entrant.config, "counted")
        found[entrant.label] = sum(parameter.numel() for parameter in adapter.parameters())
        remove(model, "counted")
    return found


def test_square_matrices_get_the_papers_ranks(shared: Path) -> None:
    tables = json.loads((shared / "papers" / "lora_tables.json").read_text())
    rows = tables["table5_which_matrices_18M"]["rows"]
    expected = [(row["matrices"].replace(",", ""), row["r"]) for row in rows]
    found = [
        (chosen, table["r"])
        for chosen, table in zip(MATRICES, which_matrices(square()), strict=True)
    ]
    assert found == expected
    counts = trained(square())
    assert set(counts.values()) == {8 * 2 * 32}
    assert [list(RANKS), list(RANKED)] == [
        tables["table6_rank"]["r"],
        [name.replace(",", "") for name in tables["table6_rank"]["MNLI"]],
    ]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, TinyBases().causal])
def test_every_choice_has_one_budget(make: Callable[[], Any]) -> None:
    counts = trained(make())
    assert len(counts) == len(MATRICES)
    budget = next(iter(counts.values()))
    assert all(abs(count - budget) <= 0.1 * budget for count in counts.values()), counts


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_presets_are_entrants(make: Callable[[], Any]) -> None:
    for name, tables in PRESETS.items():
        found, faults = entrants_of(tables(make()), [1e-3, 1e-2])
        assert not faults, name
        assert len(found) >= 1
    assert len(PRESETS["which-rank"](make())) == len(RANKED) * len(RANKS)


def test_parts_of_one_projection_stand_in_one_target() -> None:
    assert joined(["c_attn:q", "c_attn:v", "attn.c_proj"]) == ["c_attn:q,v", "attn.c_proj"]


def test_a_base_without_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModule, match="does not know"):
        which_matrices(Vision())
