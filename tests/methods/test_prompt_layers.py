"""The LoRA paper's prefix-layer tuning: trained activations before every layer, and its counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from sidepath.errors import UnsupportedModule
from sidepath.methods.prompt import PromptTuning
from sidepath.store.adapter import inject, load
from tests.conftest import randomise
from tests.methods.architectures import ARCHITECTURES
from tests.methods.kit import left_padded, rows
from tests.methods.test_prompt import COUNT, by_hand


def layer_by_layer(plain: Any, own_LPD: Tensor, ids_T: Tensor) -> Tensor:
    """The plain model's logits (T, V), its layers called one by one on replaced activations."""
    body, count = plain.base_model, own_LPD.shape[1]
    places = torch.arange(count + len(ids_T))[None]
    x_BTD = torch.cat([own_LPD[0], plain.get_input_embeddings()(ids_T)])[None]
    gpt2 = body.config.model_type == "gpt2"
    if gpt2:
        x_BTD = x_BTD + body.wpe(places)
        layers, norm, more = body.h, body.ln_f, {}
    else:
        layers, norm = body.layers, body.norm
        more = {"position_embeddings": body.rotary_emb(x_BTD, position_ids=places)}
    for at, layer in enumerate(layers):
        if at:
            x_BTD = torch.cat([own_LPD[at][None], x_BTD[:, count:]], dim=1)
        x_BTD = layer(x_BTD, **more)
    logits: Tensor = plain.lm_head(norm(x_BTD))[0, count:]
    return logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_every_layer_it_is_the_papers_prefix_layer(name: str, tmp_path: Path) -> None:
    plain, model = ARCHITECTURES[name](), ARCHITECTURES[name]()
    adapter = inject(model, PromptTuning(tokens=COUNT, every_layer=True), "p")
    randomise(adapter.parameters(), std=1.0)
    embeddings_PD, later_NPD = adapter.parameters()
    own_LPD = torch.cat([embeddings_PD[None], later_NPD])
    assert own_LPD.shape == (2, COUNT, 32)
    with torch.no_grad():
        found = model(**left_padded()).logits
        for row, ids_T in enumerate(rows()):
            expected = layer_by_layer(plain, own_LPD, ids_T)
            torch.testing.assert_close(found[row, -len(ids_T) :], expected)
        without = by_hand(plain, embeddings_PD, rows()[0]).logits[0, COUNT:]
        assert not torch.allclose(without, layer_by_layer(plain, own_LPD, rows()[0]), atol=1e-3)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    slow = model.generate(**left_padded(), use_cache=False, **settings)
    assert torch.equal(model.generate(**left_padded(), **settings), slow)
    model(**left_padded()).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    load(plain, adapter.save(tmp_path / "p"), "again")
    with torch.no_grad():
        assert torch.equal(plain(**left_padded()).logits, found)


@pytest.mark.parametrize(("lp", "printed"), [(32, 0.4), (64, 0.9), (128, 1.7)])
def test_the_counts_of_the_lora_papers_prefix_embedding(lp: int, printed: float) -> None:
    """LoRA's Table 15, with l_i = 8 more at the end: d (l_p + l_i) for GPT-3's d of 12,288."""
    with torch.device("meta"):
        config = transformers.GPT2Config(n_embd=12_288, n_layer=1, n_head=96, n_positions=2048)
        model = transformers.GPT2LMHeadModel(config)
    adapter = inject(model, PromptTuning(tokens=lp + 8), "p")
    count = sum(p.numel() for p in adapter.parameters())
    assert count == 12_288 * (lp + 8)
    assert abs(count / 1e6 - printed) <= 0.1


def test_the_printed_counts_of_the_papers_prefix_layer_are_above_its_formula() -> None:
    """LoRA's Table 15: `L d (l_p + l_i)` is what section 5.1 says; printed are 0.8 to 8 % more."""
    with torch.device("meta"):
        config = transformers.GPT2Config(n_embd=12_288, n_layer=96, n_head=96, n_positions=2048)
        model = transformers.GPT2LMHeadModel(config)
    printed = {2 + 2: 5.1, 8 + 0: 10.1, 8 + 8: 20.2, 32 + 4: 44.1, 64 + 0: 76.1}
    for tokens, millions in printed.items():
        adapter = inject(model, PromptTuning(tokens=tokens, every_layer=True), f"p{tokens}")
        count = sum(p.numel() for p in adapter.parameters())
        assert count == 96 * 12_288 * tokens
        assert 1.005 < millions / (count / 1e6) < 1.085


def test_layers_of_another_width_than_the_embeddings_are_refused() -> None:
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=64,
        max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    with pytest.raises(UnsupportedModule, match="as wide as the embeddings"):
        inject(model, PromptTuning(tokens=2, every_layer=True))
    (own_PD,) = inject(model, PromptTuning(tokens=2)).parameters()
    assert own_PD.shape == (2, 16)
    model(rows()[0][None])
