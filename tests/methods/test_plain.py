"""Everything, the head alone or the biases alone: counts, plain torch's training, merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.errors import ConfigError, TargetNotFound
from sidepath.injection.merging import merge, unmerge
from sidepath.injection.registry import base_parameters, registry_of
from sidepath.methods.base import Method
from sidepath.methods.plain import BitFit, FullFineTuning, LinearProbe
from sidepath.store.adapter import inject, load
from sidepath.training.loop import train
from tests.conftest import randomise, tiny_bert, tiny_llama
from tests.methods.architectures import ARCHITECTURES, inputs_of, logits_of
from tests.methods.kit import bert, gpt2, published, trained

RATE = 0.01


def biases(model: nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in base_parameters(model) if name.endswith(".bias")}


def test_the_last_two_blocks_are_the_papers_ft_top2(shared: Path) -> None:
    """LoRA's Table 3: `2 (12 d² + 13 d)` of GPT-2 medium."""
    count = trained(gpt2(1024, 24), FullFineTuning(top=2), transformers.GPT2LMHeadModel)
    assert count == published(shared, "T3", "FT-top2 ") == 2 * (12 * 1024**2 + 13 * 1024)


def test_everything_is_every_parameter_and_a_tied_one_once() -> None:
    for name in ARCHITECTURES:
        model = ARCHITECTURES[name]()
        expected = sum(p.numel() for p in model.parameters())
        adapter = inject(model, FullFineTuning(), "a")
        assert sum(p.numel() for p in adapter.parameters()) == expected, name


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("gpt2", ("transformer.h.1",)),
        ("bert", ("bert.encoder.layer.1",)),
        ("t5", ("encoder.block.1", "decoder.block.1")),
    ],
)
def test_top_takes_the_last_blocks_and_what_is_named_beside_them(
    name: str, blocks: tuple[str, ...]
) -> None:
    model = ARCHITECTURES[name]()
    wanted = {key for key, _ in model.named_parameters() if key.startswith(blocks)}
    deltas = inject(model, FullFineTuning(top=1), "a").deltas
    found = {f"{path}.{key}" for path, delta in deltas.items() for key in delta.tensors()}
    assert found == wanted
    if name == "bert":
        both = inject(model, FullFineTuning(top=1, train_whole=("classifier",)), "b")
        assert set(both.deltas) - set(deltas) == {"classifier"}


def test_bitfit_trains_every_bias_and_nothing_else() -> None:
    """BERT-base: `11 d` a block and `2 d` outside of them, 102,912."""
    assert trained(bert(768, 12), BitFit(), transformers.BertModel) == 12 * 11 * 768 + 2 * 768
    for name in ("bert", "roberta", "gpt2", "opt", "vit"):
        model = ARCHITECTURES[name]()
        expected = biases(model)
        deltas = inject(model, BitFit(), "a").deltas
        found = {
            f"{path}.{key}": tensor.numel()
            for path, delta in deltas.items()
            for key, tensor in delta.tensors().items()
        }
        assert found == expected, name


def test_a_head_trained_whole_takes_its_bias_with_it() -> None:
    model = tiny_bert(labels=3)
    expected = sum(biases(model).values()) + 3 * 32
    adapter = inject(model, BitFit(train_whole=("classifier",)), "a")
    assert sum(p.numel() for p in adapter.parameters()) == expected


def test_a_probe_is_a_linear_classifier_over_frozen_features() -> None:
    assert LinearProbe().with_heads(("classifier",)) == LinearProbe()
    assert FullFineTuning().with_heads(("score",)).train_whole == ("score",)  # type: ignore[attr-defined]
    model, inputs = ARCHITECTURES["bert"](), inputs_of("bert")
    features: Tensor = model.base_model(**inputs).pooler_output.detach()  # type: ignore[operator]
    adapter = inject(model, LinearProbe(), "a")
    weight, bias = adapter.parameters()
    assert (weight.shape, bias.shape) == ((3, 32), (3,))
    randomise(adapter.parameters())
    logits = logits_of(model, inputs)
    torch.testing.assert_close(logits, F.linear(features, weight, bias))
    logits.square().sum().backward()
    found = weight.grad
    slow = weight.detach().clone().requires_grad_(True)
    F.linear(features, slow, bias.detach()).square().sum().backward()
    torch.testing.assert_close(found, slow.grad)
    with pytest.raises(TargetNotFound):
        inject(transformers.BertModel(model.config), LinearProbe())


def written_out(model: Any, data: Data, steps: int) -> list[float]:
    """Plain torch's training of a whole model on all rows each step; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for example in data.examples:
            ids_T = torch.tensor(example.ids_T.tolist())
            targets = torch.tensor(example.supervised_T.tolist())[1:]
            logits_TV = model(ids_T[None]).logits[0, :-1]
            total = total + F.cross_entropy(logits_TV[targets], ids_T[1:][targets], reduction="sum")
            count += int(targets.sum())
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(total.item() / count)
    return losses


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trained_and_merged_it_is_plain_torchs_training_step_by_step(
    tied: bool, tokenizer: Any, pairs: list[dict[str, str]]
) -> None:
    plain, model = (tiny_llama(vocab=258, tied=tied).double().train() for _ in range(2))
    data = load_data(pairs[:6], tokenizer)
    expected = written_out(plain, data, steps=5)
    before = {name: p.detach().clone() for name, p in base_parameters(model)}
    inject(model, FullFineTuning(), "a")
    config = TrainConfig(
        steps=5, batch_size=6, learning_rate=RATE, schedule="constant", warmup=0.0, clip=0.0
    )
    losses = [step.loss for step in train(model, data, config)]
    assert losses == pytest.approx(expected, rel=1e-10)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in base_parameters(model))
    merge(model, "a")
    wanted = dict(plain.named_parameters())
    found = dict(base_parameters(model))
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=1e-9)
        assert not torch.equal(parameter, before[name])
    unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in base_parameters(model))


@pytest.mark.parametrize("method", [FullFineTuning(), FullFineTuning(top=1), BitFit()], ids=repr)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_merged_saved_and_loaded_it_answers_alike(
    name: str, method: Method, tmp_path: Path
) -> None:
    """GPT-2's head and embedding are one tensor, and stay one."""
    model, inputs = ARCHITECTURES[name](), inputs_of(name)
    adapter = inject(model, method, "a")
    randomise(adapter.parameters())
    again = ARCHITECTURES[name]()
    load(again, adapter.save(tmp_path / "a"))
    with torch.no_grad():
        expected = logits_of(model, inputs)
        assert torch.equal(logits_of(again, inputs), expected)
        merge(model, "a")
        torch.testing.assert_close(logits_of(model, inputs), expected)
    if name == "gpt2":
        assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: FullFineTuning(top=0), "top"),
        (lambda: FullFineTuning(top=-1), "top"),
        (lambda: FullFineTuning(top=1.5), "top"),  # type: ignore[arg-type]
        (lambda: LinearProbe(train_whole=()), "train_whole"),
        (lambda: BitFit(train_whole="head"), "train_whole"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings(make: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.faults[0].startswith(f"{field} = ")


def test_more_blocks_than_there_are_and_biases_that_are_not_there() -> None:
    model = ARCHITECTURES["llama"]()
    with pytest.raises(TargetNotFound, match="the model has 2"):
        inject(model, FullFineTuning(top=3))
    with pytest.raises(TargetNotFound, match="no bias to train"):
        inject(model, BitFit())
    assert registry_of(model) is None
