from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.errors import TrainError
from sidepath.injection.registry import base_parameters
from sidepath.store.adapter import Adapter, load
from sidepath.store.fingerprint import fingerprint
from sidepath.training.evaluate import evaluate
from sidepath.training.loop import train
from sidepath.training.processes import ALONE, Processes
from sidepath.training.sharding import blocks_of, shard
from tests.training.joined import in_processes
from tests.training.kit import bert, llama, with_lora


@pytest.fixture
def data(tokenizer: Any, pairs: Any) -> Data:
    return load_data(pairs, tokenizer)


CONFIG = TrainConfig(steps=6, batch_size=4, accumulate=2, learning_rate=2e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sharded_base_gives_the_adapter_of_one_process(
    data: Data, tmp_path: Path, checkpointing: bool
) -> None:
    config = TrainConfig(**{**vars(CONFIG), "gradient_checkpointing": checkpointing})
    model = with_lora(llama())
    pristine = fingerprint(model)
    losses = [report.loss for report in train(model, data, config)]
    expected = Adapter("a", model).save(tmp_path / "alone")
    whole = sum(parameter.numel() for _, parameter in base_parameters(model))

    def work(processes: Processes) -> Any:
        twin = with_lora(llama())
        shard(twin, processes)
        names = dict(base_parameters(twin))
        assert all(isinstance(parameter, DTensor) for parameter in names.values())
        held = sum(parameter.to_local().numel() for parameter in names.values())  # type: ignore[attr-defined]
        found = [report.loss for report in train(twin, data, config)]
        metrics = evaluate(twin, data, metrics=["loss"], processes=processes)
        if processes.first:
            Adapter("a", twin).save(tmp_path / "sharded")
        processes.wait()
        return [found, held, metrics["loss"], fingerprint(twin).id]

    for found, held, loss, identity in in_processes(2, tmp_path / "meet", work):
        assert found == pytest.approx(losses, rel=1e-4)
        assert held == pytest.approx(whole / 2, rel=0.02)
        assert loss == pytest.approx(evaluate(model, data, metrics=["loss"])["loss"], rel=1e-4)
        assert identity == pristine.id
    fresh = llama()
    saved = load(fresh, tmp_path / "sharded", "a")
    reference = llama()
    load(reference, expected, "a")
    for one, other in zip(saved.parameters(), Adapter("a", reference).parameters(), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_optimiser_state_is_the_adapters_alone(data: Data, tmp_path: Path) -> None:
    def work(processes: Processes) -> Any:
        model = with_lora(llama())
        shard(model, processes)
        config = TrainConfig(steps=2, learning_rate=1e-2, checkpoint_every=1)
        list(train(model, data, config, checkpoints=tmp_path / "run"))
        return sum(parameter.numel() for parameter in Adapter("a", model).parameters())

    trained, _ = in_processes(2, tmp_path / "meet", work)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "run" / "step-00000002" / "tensors.safetensors")
    moments = sum(t.numel() for name, t in state.items() if "/exp_avg" in name)
    assert moments == 2 * trained


def test_what_cannot_be_sharded_is_refused() -> None:
    model = with_lora(llama())
    with pytest.raises(TrainError, match=r"needs torch\.distributed"):
        shard(model, ALONE)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(TrainError, match=r"lm_head\.weight: trained"):
        shard(model, ALONE)


def test_blocks() -> None:
    assert [type(block).__name__ for block in blocks_of(llama())] == ["LlamaDecoderLayer"] * 2
    assert {type(block).__name__ for block in blocks_of(bert())} == {"BertEmbeddings", "BertLayer"}
    assert blocks_of(torch.nn.Linear(2, 2)) == []
