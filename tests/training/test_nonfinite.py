"""NaN and Inf stop a run at their step; the weights and the last good checkpoint stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.errors import NonFinite, ResumeError
from sidepath.training.checkpoint import latest
from sidepath.training.loop import train
from sidepath.training.report import StepReport
from tests.training.kit import llama, with_lora

STEPS, ROWS_A_STEP = 20, 6
CONFIG = TrainConfig(
    steps=STEPS, batch_size=2, accumulate=3, learning_rate=1e-2, checkpoint_every=1
)
LINES = 120


def rows(bad: int | None) -> list[dict[str, str]]:
    """120 rows, one epoch of 20 steps; the row on line `bad` holds the letter Q."""
    return [
        {"prompt": f"{'Q' if line == bad else 'q'}{line:03}=", "completion": "z"}
        for line in range(1, LINES + 1)
    ]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Stopped:
    """A run up to its NonFinite."""

    def __init__(self, model: Any, data: Data, folder: Path, *, resume: bool = False) -> None:
        self.numbers: list[int] = []
        self.before = weights(model)
        steps = train(model, data, CONFIG, checkpoints=folder, resume=resume)
        with pytest.raises(NonFinite) as caught:
            self._follow(steps, model)
        self.error = caught.value
        self.untouched = same(self.before, weights(model))

    def _follow(self, steps: Iterator[StepReport], model: Any) -> None:
        for report in steps:
            self.numbers.append(report.number)
            self.before = weights(model)


class Poison(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * float("nan")


def poisoned(kind: str, tokenizer: Any) -> Any:
    """A model for which a row with the letter Q has a loss, or a gradient, that is not finite."""
    model = with_lora(llama(), dropout=0.2, r=3)
    letter, answer = (tokenizer(text).input_ids[-1] for text in "Qz")
    wrong: list[bool] = []

    def look(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        wrong[:] = [bool((named["input_ids"] == letter).any())]

    def spoil(module: Any, arguments: Any, logits: torch.Tensor) -> torch.Tensor:
        if not wrong[0]:
            return logits
        if kind == "gradient":
            spoiled: torch.Tensor = Poison.apply(logits)  # type: ignore[no-untyped-call]
            return spoiled
        bad = torch.zeros(logits.shape[-1])
        bad[answer] = float("nan") if kind == "NaN" else -float("inf")
        return logits + bad

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.lm_head.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("kind", ["NaN", "Inf", "gradient"])
def test_a_run_stops_there_and_keeps_what_was_good(
    tmp_path: Path, tokenizer: Any, kind: str
) -> None:
    data = load_data(rows(bad=77), tokenizer)

    def make() -> Any:
        return poisoned(kind, tokenizer)

    stopped = Stopped(make(), data, tmp_path)
    step = len(stopped.numbers) + 1
    assert 1 < step <= STEPS
    assert stopped.numbers == list(range(1, step))
    assert stopped.error.what == (
        f"step {step}: the {'gradient' if kind == 'gradient' else 'loss'} is not finite"
    )
    # The forward pass of the row where the loss is wrong; the whole step where it is not known.
    named = str(stopped.error.where).split("rows ")[1].split(", ")
    assert "77" in named
    assert len(named) == (ROWS_A_STEP if kind == "gradient" else CONFIG.batch_size)
    assert stopped.untouched
    # The checkpoint before that step is there, whole, and holds the weights that are in the model.
    found, notices = latest(tmp_path)
    assert found is not None
    assert (found.step, notices) == (step - 1, [])
    for name, tensor in found.tensors.items():
        assert bool(torch.isfinite(tensor).all()), name
    held = [value for key, value in found.tensors.items() if key.startswith("model/")]
    assert len(held) == 8
    at_the_end = stopped.before.values()
    assert all(any(torch.equal(value, other) for other in at_the_end) for value in held)
    bytes_of = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # Resuming does not get past it, nor does it change what is there.
    again = Stopped(make(), data, tmp_path, resume=True)
    assert again.numbers == []
    assert again.error.what == stopped.error.what
    assert again.error.where == stopped.error.where
    assert bytes_of == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # Mended rows are other data: refused, and named.
    mended = load_data(rows(bad=None), tokenizer)
    with pytest.raises(ResumeError, match=r"data\.digest: the checkpoint has"):
        train(make(), mended, CONFIG, checkpoints=tmp_path, resume=True)
    anew = train(make(), mended, CONFIG, checkpoints=tmp_path / "new")
    assert len(list(anew)) == STEPS
