"""`[[method]]` tables: grids, and every fault of all of them at once."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from sidepath.compare.entrants import entrants_of
from sidepath.methods.lora import LoRA


def test_a_grid_is_every_combination() -> None:
    table = {"name": "lora", "alpha": 4, "grid": {"r": [1, 2], "targets": [["q"], ["q", "v"]]}}
    found, faults = entrants_of([table], [1e-2, 1e-3])
    assert not faults
    assert [one.label for one in found] == [
        "lora r=1 targets=q",
        "lora r=1 targets=q+v",
        "lora r=2 targets=q",
        "lora r=2 targets=q+v",
    ]
    assert found[3].config == LoRA(r=2, alpha=4.0, targets=("q", "v"))
    assert {one.learning_rates for one in found} == {(1e-3, 1e-2)}


def test_all_faults_at_once() -> None:
    tables: list[dict[str, Any]] = [
        {"name": "lorra"},
        {"name": "lora", "r": 0, "learning_rates": [1e-3, -1]},
        {"name": "lora", "rank": 3},
        {"r": 3},
        {"name": "probe", "grid": {"top": [1]}},
        {"name": "full", "grid": 3, "label": ""},
    ]
    _, faults = entrants_of(tables, [1e-3])
    text = "\n".join(faults)
    for part in (
        'unknown method "lorra": did you mean "lora"?',
        "[[method]] 2 (lora): learning_rates = [0.001, -1]",
        "[[method]] 2 (lora): r = 0",
        '[[method]] 3 (lora): "rank"',
        "[[method]] 4 has no name",
        '[[method]] 5 (probe): grid has "top"',
        "[[method]] 6 (full): label = ''",
        "[[method]] 6 (full): grid = 3",
    ):
        assert part in text, part


def test_the_sweep_is_as_wide_for_all_and_labels_are_apart() -> None:
    tables: list[dict[str, Any]] = [
        {"name": "lora"},
        {"name": "probe", "learning_rates": [1e-3]},
        {"name": "lora"},
    ]
    _, faults = entrants_of(tables, [1e-3, 1e-2])
    assert "found lora 2, probe 1" in faults[0]
    assert 'two entrants are called "lora"' in faults[1]


def test_the_examples_entrants() -> None:
    """Every one tries as many rates as the others, or the file would be refused."""
    example = Path(__file__).resolve().parents[2] / "examples" / "compare-sst2.toml"
    tables = tomllib.loads(example.read_text())
    found, faults = entrants_of(tables["method"], tables["compare"]["learning_rates"])
    assert not faults
    kinds = {"lora", "full", "probe", "bitfit", "bottleneck", "prefix", "prompt", "vera"}
    assert {entrant.config.method for entrant in found} == kinds
