"""PEFT's files as a method of ours: one default, and patterns that mean one module each."""

from __future__ import annotations

import pytest
from torch import nn

from sidepath.methods.lora import LoRA
from sidepath.store.peft_config import PeftSettings
from sidepath.store.peft_reading import lora_of, per_path, sites_of
from sidepath.store.tensors import TensorInfo


@pytest.mark.parametrize(
    "ranks",
    [
        {"a.q": 4, "b.q": 4, "c.q": 8},
        {"q": 2, "a.q": 4, "b.a.q": 8, "c": 4},
        {"a.q": 8, "x.a.q": 4, "y.a.q": 4},
        {"layers[0].q": 1, "layers0.q": 2, "a*": 3, "ab": 2},
    ],
)
def test_patterns_give_each_path_its_own_value(ranks: dict[str, int]) -> None:
    default, patterns = per_path(ranks)
    config = LoRA(r=default, targets=tuple(ranks), rank_pattern=patterns)
    assert {path: config.rank_of(path) for path in ranks} == ranks


def test_factors_copies_and_leavings_are_told_apart() -> None:
    model = nn.ModuleDict(
        {"table": nn.Embedding(4, 2), "q": nn.Linear(2, 2), "head": nn.Linear(2, 2)}
    )
    names = [
        "q.lora_A.weight",
        "q.lora_B.weight",
        "table.weight",
        "head.weight",
        "head.original_module.weight",
    ]
    header = {f"base_model.model.{name}": TensorInfo("F32", (2, 2), 0, 16) for name in names}
    modules = dict(model.named_modules())
    settings = PeftSettings(modules_to_save=("head",))
    sites, copies, ignored = sites_of(modules, settings, header)
    assert [(site.path, site.kind) for site in sites] == [("q", "dense"), ("head", "whole")]
    assert copies == {"base_model.model.table.weight": "table.weight"}
    assert ignored == {"base_model.model.head.original_module.weight"}


def test_no_factors_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="no lora_A and lora_B"):
        lora_of({}, PeftSettings(), [], {})
