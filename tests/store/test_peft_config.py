"""PEFT's settings are data: patterns are read as plain names or refused."""

from __future__ import annotations

from typing import Any

import pytest

from sidepath.store.peft_config import PeftSettings, literal, read_settings


@pytest.mark.parametrize(
    ("pattern", "name", "whole"),
    [
        ("q_proj", "q_proj", False),
        ("layers.0.q_proj", "layers.0.q_proj", False),
        (r"^model\.layers\.0\.q_proj", "model.layers.0.q_proj", True),
        ("q_proj$", "q_proj", False),
        (r"^a\-b$", "a-b", True),
    ],
)
def test_plain_names_are_understood(pattern: str, name: str, whole: bool) -> None:
    assert literal(pattern) == (name, whole)


@pytest.mark.parametrize(
    "pattern",
    ["", "^", "$", ".*", "a|b", "(a)", "[ab]", "a{2}", "a+", "a?", "a^b", "a$b", "\\d", "a\\"],
)
def test_expressions_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="regular expression"):
        literal(pattern)


def test_the_first_pattern_that_is_a_tail_of_the_path_wins() -> None:
    settings = PeftSettings(r=8, alpha=4, ranks={"^a.q": 1, "a.q": 2, "q": 3}, alphas={"b.q": 9.0})
    assert [settings.rank_at(path) for path in ("a.q", "x.a.q", "x.q", "xq")] == [1, 2, 3, 8]
    assert [settings.alpha_at(path) for path in ("a.b.q", "b.q", "q")] == [9.0, 9.0, 4]


def test_what_peft_writes_by_default_is_accepted() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q"]).to_dict()
    values: dict[str, Any] = {key: getattr(value, "value", value) for key, value in config.items()}
    values |= {"target_modules": ["q"], "loftq_config": {}}
    values.pop("runtime_config", None)
    assert read_settings(values) == (PeftSettings(), [])


def test_all_faults_come_at_once() -> None:
    values = {
        "peft_type": "LORA",
        "r": -1,
        "lora_alpha": "x",
        "use_rslora": 1,
        "rank_pattern": [],
        "alpha_pattern": {"a": 1e30},
        "modules_to_save": [3],
        "use_dora": "yes",
        "surprise": 0,
    }
    _, faults = read_settings(values)
    assert [fault.partition(":")[0] for fault in faults] == [
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "surprise",
    ]
