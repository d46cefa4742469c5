from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.errors import TrainError, UnknownAdapter
from sidepath.injection.registry import registry_of
from sidepath.store.adapter import Adapter
from sidepath.training.loop import train
from sidepath.training.together import join, train_together
from tests.training.kit import batch_of, bert, llama, with_lora

CONFIGS = {
    "a": TrainConfig(steps=5, batch_size=3, accumulate=2, learning_rate=2e-2),
    "b": TrainConfig(steps=8, batch_size=4, learning_rate=1e-2, seed=3, label_smoothing=0.1),
    "c": TrainConfig(epochs=1, batch_size=5, accumulate=3, learning_rate=3e-2, clip=0.0),
}


def loaded(tokenizer: Any, pairs: Any) -> dict[str, tuple[Data, TrainConfig]]:
    rows = {
        "a": pairs,
        "b": [{"prompt": row["completion"] + ">", "completion": row["prompt"]} for row in pairs],
        "c": [{"text": row["prompt"] * 2} for row in pairs],
    }
    return {name: (load_data(rows[name], tokenizer), CONFIGS[name]) for name in rows}


def with_three(model: Any) -> Any:
    with_lora(model, "a", r=3)
    with_lora(model, "b", r=2, targets=("all-linear",))
    return with_lora(model, "c", r=4, targets=("gate_proj", "v_proj"))


def weights(model: Any, name: str) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in Adapter(name, model).parameters()])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_adapter_becomes_what_it_becomes_alone(
    tokenizer: Any, pairs: Any, checkpointing: bool
) -> None:
    runs = {
        name: (data, TrainConfig(**{**vars(config), "gradient_checkpointing": checkpointing}))
        for name, (data, config) in loaded(tokenizer, pairs).items()
    }
    together = with_three(llama())
    base = {n: p.clone() for n, p in together.named_parameters() if "sidepath" not in n}
    reports = list(train_together(together, runs))
    assert len(reports) == 8
    for name, (data, config) in runs.items():
        alone = with_three(llama())
        expected = list(train(alone, data, config, adapter=name))
        found = [report[name] for report in reports if name in report]
        assert [one.number for one in found] == [one.number for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-4)
            assert one.tokens == other.tokens
            assert one.learning_rate == other.learning_rate
        torch.testing.assert_close(weights(together, name), weights(alone, name), rtol=0, atol=5e-4)
    for name, parameter in together.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name])
    registry = registry_of(together)
    assert registry is not None
    assert registry.routing.active == "c"
    assert registry.routing.rows is None


def test_gradients_are_those_of_each_alone(tokenizer: Any, pairs: Any) -> None:
    """One step without clipping at a tiny rate, in float64: the gradients' norm is exact."""
    runs = {
        name: (data, TrainConfig(steps=1, batch_size=4, accumulate=2, clip=0.0))
        for name, (data, _) in loaded(tokenizer, pairs).items()
    }
    together = with_three(llama()).double()
    (reports,) = train_together(together, runs)
    for name, (data, config) in runs.items():
        (alone,) = train(with_three(llama()).double(), data, config, adapter=name)
        assert reports[name].gradient_norm == pytest.approx(alone.gradient_norm, rel=1e-7)
        assert reports[name].loss == pytest.approx(alone.loss, rel=1e-7)


def test_adapters_of_one_rank_on_other_layers_keep_their_rows(tokenizer: Any, pairs: Any) -> None:
    """Two adapters in each layer, never the same two: no layer takes another's mask."""

    def made() -> Any:
        model = with_lora(llama(), "a", targets=("q_proj", "k_proj"))
        with_lora(model, "b", targets=("k_proj", "v_proj"))
        return with_lora(model, "c", targets=("v_proj", "q_proj")).double()

    runs = {
        name: (data, TrainConfig(steps=2, batch_size=4, learning_rate=1e-2))
        for name, (data, _) in loaded(tokenizer, pairs).items()
    }
    together = list(train_together(made(), runs))
    for name, (data, config) in runs.items():
        alone = list(train(made(), data, config, adapter=name))
        for one, other in zip(together, alone, strict=True):
            assert one[name].gradient_norm == pytest.approx(other.gradient_norm, rel=1e-6)


def test_classifiers(tokenizer: Any) -> None:
    rows = [{"text": "ab" * (at % 7) + str(at), "label": at % 2} for at in range(20)]
    data = load_data(rows, tokenizer)
    config = TrainConfig(steps=4, batch_size=4, learning_rate=1e-2)

    def made() -> Any:
        torch.manual_seed(0)
        model = bert()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        fields = {"targets": ("query",), "train_whole": ("classifier",)}
        return with_lora(with_lora(model, "a", **fields), "b", **fields)

    together = made()
    reports = list(train_together(together, dict.fromkeys("ab", (data, config))))
    alone = made()
    expected = list(train(alone, data, config, adapter="b"))
    assert [r["b"].loss for r in reports] == pytest.approx([r.loss for r in expected], rel=1e-4)


def test_each_run_resumes_from_its_own_folder(tokenizer: Any, pairs: Any, tmp_path: Path) -> None:
    runs = {
        name: (data, TrainConfig(**{**vars(config), "checkpoint_every": 1}))
        for name, (data, config) in loaded(tokenizer, pairs).items()
    }
    whole = with_three(llama())
    list(train_together(whole, runs, checkpoints=tmp_path / "whole"))
    cut = train_together(with_three(llama()), runs, checkpoints=tmp_path / "cut")
    for _ in range(3):
        next(cut)
    cut.close()
    again = with_three(llama())
    list(train_together(again, runs, checkpoints=tmp_path / "cut", resume=True))
    for name in runs:
        assert torch.equal(weights(whole, name), weights(again, name))


def test_what_cannot_go_together_is_said_at_once(tokenizer: Any, pairs: Any) -> None:
    data = load_data(pairs, tokenizer)
    one = TrainConfig(steps=1, autocast="bfloat16", packing=True)
    other = TrainConfig(steps=1, checkpoint_every=1, eval_every=1)
    with pytest.raises(TrainError) as caught:
        train_together(with_three(llama()), {"a": (data, one), "b": (data, other)})
    text = "\n".join(caught.value.faults)
    for named in ("autocast differs", '"a": packed', '"b": held-out', '"b": checkpoint_every'):
        assert named in text
    with pytest.raises(UnknownAdapter):
        train_together(with_three(llama()), {"d": (data, one)})
    with pytest.raises(TrainError, match="cannot be trained together"):
        train_together(with_three(llama()), {})


def test_joined_rows_keep_their_own(tokenizer: Any, pairs: Any) -> None:
    data = load_data(pairs, tokenizer)
    batches = [batch_of(data, [0, 3]), batch_of(data, [8])]
    joined = join(batches, data.pad_id)
    for batch, start in zip(batches, (0, 2), strict=True):
        rows, width = batch.ids_BT.shape
        for ours, theirs in (
            (joined.ids_BT, batch.ids_BT),
            (joined.attention_mask_BT, batch.attention_mask_BT),
            (joined.targets_BT, batch.targets_BT),
        ):
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours[start : start + rows, :width], theirs)
    assert joined.attention_mask_BT is not None
    assert joined.tokens == int(joined.attention_mask_BT.sum())


def test_resume_without_a_folder_is_refused(tokenizer: Any, pairs: Any) -> None:
    model = with_lora(llama(), "a")
    runs = {"a": (load_data(pairs, tokenizer), TrainConfig(steps=1))}
    with pytest.raises(TrainError, match="resume needs a folder"):
        train_together(model, runs, resume=True)
