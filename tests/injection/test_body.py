"""Where a model's body ends: its heads, and the one module that is called with whole rows."""

from __future__ import annotations

import pytest
from torch import nn

from sidepath.errors import UnsupportedModule
from sidepath.injection.body import body_path, body_prefix, head_paths, heads_of, output_embedding
from tests.methods.architectures import ARCHITECTURES

BODIES = {
    "llama": ("model", ["lm_head"]),
    "mixture": ("model", ["lm_head"]),
    "gpt2": ("transformer", ["lm_head"]),
    "opt": ("model.decoder", ["lm_head"]),
    "bert": ("bert", ["classifier"]),
    "roberta": ("roberta", ["classifier"]),
    "deberta-v2": ("deberta", ["pooler", "classifier"]),
}
"""The module that turns tokens into hidden states, and the heads outside of it."""


@pytest.mark.parametrize("name", BODIES)
def test_body_and_heads(name: str) -> None:
    model, (body, heads) = ARCHITECTURES[name](), BODIES[name]
    assert body_path(model) == body
    assert heads_of(model) == heads
    assert head_paths(model) == heads
    last = output_embedding(model)
    assert last is (model.get_submodule("lm_head") if heads == ["lm_head"] else None)


def test_a_body_alone_has_no_heads() -> None:
    body = ARCHITECTURES["llama"]().get_submodule("model")
    assert body_prefix(body) == ""
    assert head_paths(body) == []
    with pytest.raises(UnsupportedModule, match="no head"):
        body_path(body)


def test_where_no_one_call_sees_a_row() -> None:
    with pytest.raises(UnsupportedModule, match="encoder and decoder are called apart"):
        body_path(ARCHITECTURES["t5"]())
    with pytest.raises(UnsupportedModule, match="takes no embeddings"):
        body_path(ARCHITECTURES["vit"]())
    with pytest.raises(UnsupportedModule, match="no head"):
        body_path(nn.Sequential(nn.Linear(2, 2)))
