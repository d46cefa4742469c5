"""What is read off a model's tree and config: blocks, attention's matrices and width, experts."""

from __future__ import annotations

import pytest
from torch import nn

from sidepath.injection.architecture import (
    attention_matrices,
    attention_width,
    block_index,
    block_of,
    experts_of,
    modules_of,
    up_to,
)
from sidepath.injection.surgery import put_in
from sidepath.injection.targets import resolve
from sidepath.methods.lora import LoRA
from tests.methods.architectures import ARCHITECTURES


def test_blocks_are_known_by_the_first_number_of_a_name() -> None:
    assert block_of("model.layers.3.mlp.experts.7.up") == "model.layers.3"
    assert block_of("model.layers.3") == "model.layers.3"
    assert block_index("model.layers.12.mlp.experts.7") == 12
    assert block_of("model.norm2") is None
    assert block_index("lm_head") is None


def test_a_name_up_to_the_first_part_that_is_wanted() -> None:
    assert up_to("a.bb.c.bb", lambda part: part == "bb") == "a.bb"
    assert up_to("a.b", lambda part: part == "bb") is None


def test_modules_come_in_named_modules_order_without_side_paths() -> None:
    model = ARCHITECTURES["t5"]()
    before = [(path, module) for path, module in model.named_modules() if path]
    assert list(modules_of(model)) == before
    config = LoRA(r=2, targets=("q", "v"))
    put_in(model, config, "a", resolve(model, config))
    assert list(modules_of(model)) == before
    assert len(list(model.named_modules())) > len(before) + 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attentions_four_matrices_resolve(name: str) -> None:
    """As targets they name a matrix each, in every layer that attends."""
    model = ARCHITECTURES[name]()
    names = attention_matrices(model)
    assert names is not None
    found = {
        letter: {site.path for site in resolve(model, LoRA(r=1, targets=(target,)))}
        for letter, target in names.items()
    }
    assert list(found) == ["q", "k", "v", "o"]
    counts = {len(paths) for paths in found.values()}
    # T5 names the attention of either stack alike, and a decoder's second one otherwise.
    assert counts == ({4} if name == "t5" else {2})


def test_unknown_names_are_no_guess() -> None:
    assert attention_matrices(nn.Sequential(nn.Linear(2, 2))) is None


WIDTHS = {"llama": 2 * 32, "gemma": 2 * 32, "gpt2": 2 * 32, "opt": 2 * 32, "t5": (2 + 2 + 2) * 32}


@pytest.mark.parametrize("name", WIDTHS)
def test_attentions_width_over_all_layers(name: str) -> None:
    """Two layers of four heads of eight; T5 twice, and its decoder attends to the encoder too."""
    assert attention_width(ARCHITECTURES[name]()) == WIDTHS[name]


def test_of_a_model_without_a_config_nothing_is_claimed() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert attention_width(model) is None
    assert experts_of(model) is None


def test_experts() -> None:
    assert experts_of(ARCHITECTURES["mixture"]()) == (2, 4)
    assert experts_of(ARCHITECTURES["llama"]()) is None
