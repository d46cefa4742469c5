"""Inference figures: what is run each time is the same, and the ways answer alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sidepath.bench.decode import BASE, STEPS, Decode, Decoder, Prefill, answering
from sidepath.bench.models import token_ids
from sidepath.bench.peers import has_peft
from sidepath.bench.setting import Bench


def test_a_decoder_starts_each_run_from_the_prompt(quick: Bench) -> None:
    models = answering("llama", "float32", quick)
    decoder = Decoder(models["ours"], token_ids(models[BASE], 2, 8))
    lengths = []
    for _ in range(2):
        decoder.reset()
        lengths.append(decoder.cache.get_seq_length())
        decoder.run()
        lengths.append(decoder.cache.get_seq_length())
    assert lengths == [8, 8 + STEPS] * 2


def test_a_decoded_token_is_the_one_of_a_whole_pass(quick: Bench) -> None:
    """The cache of ours was filled by ours: its logits are those without a cache."""
    model: Any = answering("llama", "float32", quick)["ours"]
    ids_BT = token_ids(model, 2, 8)
    decoder = Decoder(model, ids_BT[:, :-1])
    with torch.no_grad():
        whole = model(input_ids=ids_BT, use_cache=False).logits[:, -1]
        step = model(
            input_ids=ids_BT[:, -1:], past_key_values=decoder.cache, use_cache=True
        ).logits[:, -1]
    torch.testing.assert_close(whole, step, rtol=1e-4, atol=1e-5)


def test_the_adapter_answers_and_the_base_does_not_know_it(quick: Bench) -> None:
    models = answering("llama", "float32", quick)
    ids_BT = token_ids(models[BASE], 2, 8)
    with torch.no_grad():
        logits = {way: model(input_ids=ids_BT).logits for way, model in models.items()}
    assert not torch.allclose(logits["ours"], logits[BASE])
    assert not any(model.training for model in models.values())
    if has_peft():
        torch.testing.assert_close(logits["ours"], logits["PEFT"], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("without_peft")
@pytest.mark.parametrize("figure", [Decode("bfloat16", 8), Prefill("bfloat16", 8, 128)])
def test_without_the_peer(figure: Decode | Prefill, quick: Bench) -> None:
    found = figure("x", quick)
    assert set(found.ways) == {"base", "ours"}
    assert [one.of for one in found.comparisons] == ["ours / base"]
