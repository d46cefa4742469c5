"""A watched run: what is recorded is what an obvious reader finds, and nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidepath.analyse import factors_of, spectrum
from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.errors import ConfigError, TrainError
from sidepath.methods import METHODS
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import Adapter, inject
from sidepath.training import run as running
from sidepath.training.history import FILE, History, read_history
from sidepath.training.loop import train
from sidepath.training.optim import clip_gradients
from sidepath.training.processes import Processes
from sidepath.training.together import train_together
from tests.conftest import tiny_gpt2
from tests.training.joined import in_processes
from tests.training.kit import llama, with_lora

CONFIG: dict[str, Any] = {
    "steps": 7,
    "batch_size": 3,
    "accumulate": 2,
    "learning_rate": 2e-2,
    "clip": 0.1,
    "watch": 2,
}


@pytest.fixture
def data(tokenizer: Any, pairs: Any) -> Data:
    return load_data(pairs, tokenizer)


def watched(model: Any, data: Data, **changes: Any) -> History:
    training = train(model, data, TrainConfig(**{**CONFIG, **changes}))
    reports = list(training)
    history = training.history
    assert history is not None
    assert list(history.loss) == [report.loss for report in reports]
    return history


def digests(model: nn.Module) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in model.state_dict().items()}


def test_every_so_many_steps_what_inspect_would_find(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference: an adapter saved after every step and read from its folder, and each
    gradient's norm by hand, before clipping.
    """
    model = llama()
    torch.manual_seed(5)
    adapter = inject(model, LoRA(r=3, rank_pattern={"down_proj": 2}), "a")
    norms: list[dict[str, float]] = []

    def clipping(parameters: Any, *rest: Any) -> None:
        norms.append({path: _gradient(delta) for path, delta in adapter.deltas.items()})
        clip_gradients(parameters, *rest)

    monkeypatch.setattr(running, "clip_gradients", clipping)
    training = train(model, data, TrainConfig(**CONFIG))
    for report in training:
        adapter.save(tmp_path / f"{report.number}")
    history = training.history
    assert history is not None
    assert history.steps == (2, 4, 6)
    assert [layer.name for layer in history.layers] == list(adapter.deltas)
    for at, step in enumerate(history.steps):
        found = factors_of(tmp_path / f"{step}")
        for layer in history.layers:
            assert layer.effective_rank is not None
            assert layer.b_norm is not None
            factors = found[layer.name]
            expected = spectrum(factors).effective_rank
            assert layer.effective_rank[at] == pytest.approx(expected, rel=1e-5)
            assert layer.b_norm[at] == pytest.approx(float(factors.B_Or.norm()), rel=1e-5)
            gradient = norms[step - 1][layer.name]
            assert layer.gradient_norm[at] == pytest.approx(gradient, rel=1e-5)
    assert len({layer.effective_rank for layer in history.layers}) > 1


def _gradient(delta: nn.Module) -> float:
    return math.hypot(*(float(p.grad.norm()) for p in delta.parameters() if p.grad is not None))


def test_watching_changes_no_bit(data: Data) -> None:
    plain, seen = with_lora(llama(), dropout=0.2), with_lora(llama(), dropout=0.2)
    reports = list(train(plain, data, TrainConfig(**{**CONFIG, "watch": 0})))
    history = watched(seen, data, watch=1)
    assert digests(plain) == digests(seen)
    assert [report.loss for report in reports] == list(history.loss)


def test_a_run_that_is_not_watched_has_no_history(data: Data) -> None:
    training = train(with_lora(llama()), data, TrainConfig(**{**CONFIG, "watch": 0}))
    next(training)
    assert training.history is None
    training.close()


@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_runs_history_is_the_unbroken_runs(
    data: Data, tmp_path: Path, every: int
) -> None:
    def run(folder: Path, *, stop: int = 99, resume: bool = False) -> History:
        fields = {"watch": every, "checkpoint_every": 1, "eval_every": 2, "eval_share": 0.2}
        config = TrainConfig(**{**CONFIG, **fields})
        model = with_lora(llama(), dropout=0.2, r=3)
        training = train(model, data, config, checkpoints=folder, resume=resume)
        for report in training:
            if report.number == stop:
                training.close()
                break
        assert training.history is not None
        return training.history

    whole = run(tmp_path / "whole")
    assert [step for step, _ in whole.held_out] == [2, 4, 6, 7]
    for stop in (1, 2, 4, 6, 7):
        folder = tmp_path / f"{stop}"
        begun = run(folder, stop=stop)
        assert len(begun.loss) == stop
        assert run(folder, resume=True) == whole
        assert run(folder, resume=True) == whole, "none of whose steps is left"


def test_every_process_sees_the_history_of_one(data: Data, tmp_path: Path) -> None:
    alone = watched(with_lora(llama()), data)

    def work(processes: Processes) -> Any:
        return watched(with_lora(llama()), data).as_dict()

    one, other = in_processes(2, tmp_path, work)
    assert one == other
    assert one["loss"] == pytest.approx(list(alone.loss), rel=1e-4)
    for layer, expected in zip(one["layers"], alone.layers, strict=True):
        assert layer["gradient_norm"] == pytest.approx(list(expected.gradient_norm), rel=1e-3)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("lora", {"start": "pissa"}),
        ("lora", {"start": "gaussian", "dtype": "bfloat16", "train_whole": ("norm",)}),
    ],
)
def test_it_is_the_saved_form_that_is_watched(
    data: Data, tmp_path: Path, method: str, fields: dict[str, Any]
) -> None:
    """PiSSA is saved at twice its rank; factors in half precision are read as they are."""
    model = llama()
    torch.manual_seed(5)
    targets = ("q_proj", "mlp.*_proj")
    made: Any = METHODS[method]
    adapter = inject(model, made(r=2, targets=targets, **fields), "a")
    history = watched(model, data, watch=7)
    _require_last(history, adapter, tmp_path / "saved")


def test_parts_of_a_fused_projection_count_as_one_update(tmp_path: Path, tokenizer: Any) -> None:
    """GPT-2's tokens are drawn: its vocabulary is smaller than the tokenizer's."""
    from sidepath.training.trained import trained_of
    from sidepath.training.watch import Watch

    model = tiny_gpt2()
    adapter = inject(model, LoRA(r=2, targets=("c_attn:q,v", "wte", "mlp.c_fc")), "a")
    for parameter in adapter.parameters():
        parameter.data.normal_()
        parameter.grad = torch.randn_like(parameter)
    watch = Watch(trained_of(model, "a"), 1)
    watch.see_gradients(1)
    watch.see_step(1, 0.5)
    _require_last(watch.history(), adapter, tmp_path / "saved")


def _require_last(history: History, adapter: Adapter, folder: Path) -> None:
    found = factors_of(adapter.save(folder))
    thin = [layer for layer in history.layers if layer.name in found]
    assert len(thin) == len(found) > 1
    for layer in thin:
        assert layer.effective_rank is not None
        assert layer.b_norm is not None
        expected = spectrum(found[layer.name]).effective_rank
        assert layer.effective_rank[-1] == pytest.approx(expected, rel=1e-5)
        norm = float(_whole_norm(found[layer.name].B_Or))
        assert layer.b_norm[-1] == pytest.approx(norm, rel=1e-5)
    for layer in history.layers:
        if layer.name not in found:
            assert layer.effective_rank is layer.b_norm is None


def _whole_norm(B_Or: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(B_Or.double())
    return norm


@pytest.mark.parametrize("method", ["full", "bottleneck", "prefix", "vera", "intrinsic"])
def test_other_methods_have_gradient_norms_alone(data: Data, method: str) -> None:
    model = llama()
    fields = {"vera": {"r": 4}, "intrinsic": {"d": 40}}.get(method, {})
    inject(model, METHODS[method](**fields), "a")
    history = watched(model, data, watch=3, learning_rate=1e-3)
    assert history.steps == (3, 6)
    assert history.layers
    for layer in history.layers:
        assert layer.effective_rank is layer.b_norm is None
    assert all(max(layer.gradient_norm) > 0 for layer in history.layers)  # type: ignore[type-var, operator]


def test_doras_direction_is_watched(data: Data) -> None:
    model = llama()
    adapter = inject(model, LoRA(r=2, dora=True, targets=("q_proj",)), "a")
    history = watched(model, data, watch=7)
    for layer in history.layers:
        delta: Any = adapter.deltas[layer.name]
        sigma = torch.linalg.svdvals((delta.B @ delta.A).detach().double())[:2]
        shares = sigma / sigma.sum()
        expected = math.exp(-float((shares * shares.log()).sum()))
        assert layer.effective_rank == pytest.approx((expected,), rel=1e-5)


def test_a_model_without_an_adapter_is_one_place(data: Data) -> None:
    history = watched(llama(), data, watch=7, learning_rate=1e-3)
    (layer,) = history.layers
    assert layer.name == "the model"
    assert layer.effective_rank is None


def test_where_it_is_not_kept_it_is_refused(data: Data) -> None:
    model = with_lora(llama())
    with pytest.raises(TrainError, match="cannot be trained together") as caught:
        train_together(model, {"a": (data, TrainConfig(**CONFIG))})
    assert "watch" in str(caught.value)
    with pytest.raises(ConfigError, match="watch"):
        TrainConfig(watch=-1)


def test_it_is_read_as_it_was_written(data: Data, tmp_path: Path) -> None:
    model = with_lora(llama())
    history = watched(model, data, eval_share=0.2, eval_every=3)
    folder = Adapter("a", model).save(tmp_path / "a", files={FILE: history.as_json()})
    assert read_history(folder / FILE) == history
