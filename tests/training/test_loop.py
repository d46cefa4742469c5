from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.errors import DataError, NonFinite, TrainError
from sidepath.injection.merging import merge
from sidepath.injection.registry import registry_of
from sidepath.injection.surgery import activate, put_in
from sidepath.injection.targets import resolve
from sidepath.methods.lora import LoRA
from sidepath.training.loop import train
from sidepath.training.loss import batch_loss
from tests.training.kit import batch_of, bert, llama, with_lora


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    after = model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.fixture
def data(tokenizer: Any, pairs: Any) -> Data:
    return load_data(pairs, tokenizer)


def test_only_the_active_adapter_is_trained(data: Data) -> None:
    model = with_lora(with_lora(llama(), "other"), "mine")
    before = state_of(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    reports = list(train(model, data, TrainConfig(steps=3, learning_rate=1e-2)))
    touched = changed(before, model)
    assert [report.number for report in reports] == [1, 2, 3]
    assert len(touched) == 2 * 2 * 2
    assert all("mine" in name for name in touched)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_adapter_can_be_named(data: Data) -> None:
    model = with_lora(with_lora(llama(), "one"), "two")
    before = state_of(model)
    list(train(model, data, TrainConfig(steps=2, learning_rate=1e-2), adapter="one"))
    assert all("one" in name for name in changed(before, model))
    registry = registry_of(model)
    assert registry is not None
    assert registry.routing.active == "two"


def test_without_an_adapter_all_that_requires_gradients_is_trained(data: Data) -> None:
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = state_of(model)
    list(train(model, data, TrainConfig(steps=2, learning_rate=1e-3)))
    assert changed(before, model) == set(before) - {"model.embed_tokens.weight"}


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (1, 8), (3, 3)])
def test_accumulation_changes_neither_loss_nor_gradient(
    data: Data, batch_size: int, accumulate: int
) -> None:
    """Against one forward pass over all rows, in float64, on the gradient itself."""
    if batch_size * accumulate == 9:
        data = data.subset(range(9))
    else:
        data = data.subset(range(8))
    model = with_lora(llama(), dropout=0.0, dtype="base").double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    batch = batch_of(data, range(len(data)))
    loss = batch_loss(model, batch) / batch.weight
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    config = TrainConfig(
        steps=1, batch_size=batch_size, accumulate=accumulate, clip=0.0, learning_rate=1e-9
    )
    seen: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in expected:
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: seen.__setitem__(name, p.grad.clone())
            )
    (report,) = train(model, data, config)
    assert report.loss == pytest.approx(loss.item(), rel=1e-12)
    assert seen.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-9, atol=1e-14)


def test_whole_runs_agree_whatever_the_accumulation(tokenizer: Any, pairs: Any) -> None:
    data = load_data(pairs, tokenizer)
    runs = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        model = with_lora(llama())
        config = TrainConfig(
            steps=5, batch_size=batch_size, accumulate=accumulate, learning_rate=1e-2
        )
        runs.append([report.loss for report in train(model, data, config)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_steps_and_epochs(data: Data) -> None:
    def total(**fields: Any) -> int:
        config = TrainConfig(batch_size=5, accumulate=2, learning_rate=1e-4, **fields)
        return next(iter(train(with_lora(llama()), data, config))).total

    assert total(epochs=2.0) == 6
    assert total(epochs=0.5) == 2
    assert total(epochs=2.0, steps=4) == 4
    assert total(epochs=2.0, steps=40) == 6
    assert total() == 9


def test_breaking_out_puts_the_model_back(data: Data) -> None:
    model = with_lora(llama()).train()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    steps = train(model, data, TrainConfig(steps=5, gradient_checkpointing=True))
    for report in steps:
        assert model.training
        if report.number == 2:
            break
    assert isinstance(steps, Iterator)
    steps.close()  # type: ignore[attr-defined]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.training
    assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def test_the_callers_draws_change_nothing(data: Data) -> None:
    def losses(*, disturb: bool) -> list[float]:
        model = with_lora(llama(), dropout=0.3)
        found = []
        for report in train(model, data, TrainConfig(steps=4, learning_rate=1e-2)):
            found.append(report.loss)
            if disturb:
                torch.rand(3), np.random.random(), random.random()
                model.eval()
        return found

    assert losses(disturb=True) == losses(disturb=False)


def test_gradient_checkpointing_gives_the_same_run(data: Data) -> None:
    runs = []
    calls = {False: 0, True: 0}
    for checkpointing in (False, True):
        model = with_lora(llama(), dropout=0.2)

        def count(*_: Any, key: bool = checkpointing) -> None:
            calls[key] += 1

        model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(count)
        config = TrainConfig(steps=3, learning_rate=1e-2, gradient_checkpointing=checkpointing)
        runs.append([report.loss for report in train(model, data, config)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)
    assert calls == {False: 3, True: 6}


def test_bfloat16_autocast_keeps_the_weights_dtype(data: Data) -> None:
    losses = []
    for autocast in ("off", "bfloat16"):
        model = with_lora(llama())
        config = TrainConfig(steps=3, learning_rate=1e-2, autocast=autocast)  # type: ignore[arg-type]
        losses.append([report.loss for report in train(model, data, config)])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_the_best_state_is_kept_and_put_back(data: Data) -> None:
    kept, held = data.split(0.3, seed=0)
    model = with_lora(llama())
    config = TrainConfig(
        steps=12, learning_rate=0.5, eval_every=1, schedule="constant", warmup=0.0, patience=3
    )
    states = {}
    reports = []
    for report in train(model, kept, config, held_out=held):
        assert report.held_out is not None
        reports.append(report)
        states[report.number] = state_of(model)
    losses = {report.number: report.held_out["loss"] for report in reports if report.held_out}
    best = min(losses, key=lambda number: losses[number])
    assert len(reports) < 12
    assert len(reports) == best + 3
    assert not changed(states[best], model)
    assert [report.number for report in reports if report.best][-1] == best
    assert "stopped early" in reports[-1].notices[0]
    assert f"the state of step {best} is back" in reports[-1].notices[1]


def test_eval_share_holds_rows_out(data: Data) -> None:
    config = TrainConfig(epochs=1, eval_share=0.25, batch_size=6)
    reports = list(train(with_lora(llama()), data, config))
    assert len(reports) == 3
    assert reports[-1].held_out is not None
    assert reports[0].held_out is None


def test_classification_learns(tokenizer: Any) -> None:
    rows = [{"text": letter * (at % 5 + 1), "label": letter} for at in range(20) for letter in "xy"]
    data = load_data(rows, tokenizer)
    model = with_lora(bert(), targets=("query", "value"), train_whole=("classifier",))
    config = TrainConfig(steps=40, learning_rate=2e-2)
    reports = list(train(model, data, config, held_out=data))
    assert reports[-1].held_out is not None
    assert reports[-1].held_out["accuracy"] == 1.0


def test_a_side_path_without_gradient_is_named(data: Data) -> None:
    model = llama()
    model.unused = nn.Linear(4, 4)
    model = with_lora(model, targets=("q_proj", "unused"))
    before = state_of(model)
    with pytest.raises(TrainError, match="no gradient") as caught:
        next(iter(train(model, data, TrainConfig(steps=2))))
    assert caught.value.faults == ["unused"]
    assert not changed(before, model)


def test_a_side_path_of_an_embedding_gets_gradient_through_its_other_factor(data: Data) -> None:
    model = with_lora(llama(), targets=("embed_tokens",))
    assert len(list(train(model, data, TrainConfig(steps=2)))) == 2


def test_non_finite_losses_name_step_and_rows(data: Data) -> None:
    model = with_lora(llama())
    steps = train(model, data.subset(range(4)), TrainConfig(steps=3, batch_size=2, accumulate=2))
    next(steps)
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    before = state_of(model)
    with pytest.raises(NonFinite, match=r"step 2: the loss is not finite\n.*rows 1, 2, 3, 4"):
        next(steps)
    model.lm_head.weight.data[0] = 0.0
    before["lm_head.weight"][0] = 0.0
    assert not changed(before, model)


def test_wrong_settings_are_named_before_anything_is_touched(data: Data) -> None:
    model = with_lora(llama())
    config = TrainConfig(eval_every=2, patience=1, checkpoint_every=2)
    with pytest.raises(TrainError) as caught:
        train(model, data, config, resume=True)
    assert len(caught.value.faults) == 3


def test_what_cannot_be_trained(data: Data, tmp_path: Path) -> None:
    frozen = llama().requires_grad_(False)
    with pytest.raises(TrainError, match="nothing to train"):
        train(frozen, data)
    with pytest.raises(TrainError, match="holds no adapter"):
        train(llama(), data, adapter="a")
    model = with_lora(llama())
    activate(model, None)
    with pytest.raises(TrainError, match="none of them is active"):
        train(model, data)
    merge(model, "a")
    with pytest.raises(TrainError, match="is merged"):
        train(model, data, adapter="a")


def test_data_that_do_not_fit_the_model(tokenizer: Any, data: Data) -> None:
    small = llama(context=8)
    with pytest.raises(DataError, match="the model's context is 8"):
        train(small, data)
    small.config.vocab_size = 20
    with pytest.raises(DataError, match="belongs to another model") as caught:
        train(small, data)
    assert len(caught.value.faults) == 2
    labelled = load_data([{"text": "ab", "label": at} for at in range(3)], tokenizer)
    with pytest.raises(DataError, match=r"3 labels .* 2 classes"):
        train(bert(labels=2), labelled)
    with pytest.raises(TrainError, match="held-out rows are of another task"):
        train(bert(labels=3), labelled, held_out=load_data([{"text": "a", "label": 0}], tokenizer))
    cut = load_data([{"prompt": "a", "completion": "b"}], tokenizer)
    object.__setattr__(cut.examples[0], "ends", False)
    with pytest.raises(DataError, match="never learn to stop"):
        train(llama(), cut)


@pytest.mark.shared
def test_a_real_model_learns_e2e(shared: Path, real: tuple[Any, Any]) -> None:
    import copy

    model, tokenizer = copy.deepcopy(real[0]), real[1]
    config = LoRA(r=4, alpha=8, targets=("all-linear",))
    put_in(model, config, "e2e", resolve(model, config))
    activate(model, "e2e")
    columns = {"prompt": "mr", "completion": "ref"}
    rows = load_data(shared / "data/e2e/trainset.csv", tokenizer, columns=columns, limit=64)
    settings = TrainConfig(steps=12, batch_size=8, learning_rate=1e-2)
    losses = [report.loss for report in train(model, rows, settings)]
    assert losses[0] > 3
    assert losses[-1] < losses[0] - 0.8
