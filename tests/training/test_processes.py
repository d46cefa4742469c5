from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.errors import NonFinite, TrainError
from sidepath.training.evaluate import evaluate
from sidepath.training.loop import train
from sidepath.training.processes import ALONE, Processes
from sidepath.training.together import train_together
from tests.training.joined import in_processes
from tests.training.kit import bert, llama, with_lora

CONFIG: dict[str, Any] = {
    "steps": 8,
    "batch_size": 3,
    "accumulate": 2,
    "learning_rate": 2e-2,
    "checkpoint_every": 1,
    "eval_every": 3,
    "eval_share": 0.2,
}


@pytest.fixture
def data(tokenizer: Any, pairs: Any) -> Data:
    return load_data(pairs, tokenizer)


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


def trained(
    data: Data, folder: Path, *, stop: int = 99, resume: bool = False, **changes: Any
) -> dict[str, Any]:
    """One run of a LoRA with dropout; its losses and the digest of the weights."""
    dropout = changes.pop("dropout", 0.2)
    model = with_lora(llama(), dropout=dropout, r=3)
    config = TrainConfig(**{**CONFIG, **changes})
    steps = train(model, data, config, checkpoints=folder, resume=resume)
    losses, held_out = [], []
    for report in steps:
        losses.append(report.loss.hex())
        held_out.append(report.held_out and report.held_out["loss"].hex())
        if report.number == stop:
            steps.close()
            break
    weights = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "@a" in n])
    return {
        "losses": losses,
        "held_out": held_out,
        "digest": digest(model),
        "weights": weights.tolist(),
    }


def floats(texts: list[Any]) -> list[float]:
    return [float.fromhex(text) for text in texts if text]


def test_messages(tmp_path: Path) -> None:
    def work(processes: Processes) -> Any:
        rank = processes.rank
        totals = processes.total([rank + 1, 0.5])
        gathered = processes.all_of(list(range(rank)))
        processes.require_equal("x", {"t": torch.ones(3)})
        with pytest.raises(TrainError, match="weights are not the same in all processes"):
            processes.require_equal("weights", {"t": torch.ones(3) * rank})
        processes.wait()
        return [totals, gathered, processes.first]

    assert in_processes(3, tmp_path, work) == [
        [[6.0, 1.5], [0, 0, 1], True],
        [[6.0, 1.5], [0, 0, 1], False],
        [[6.0, 1.5], [0, 0, 1], False],
    ]
    assert ALONE.total([2.0]) == [2.0]
    assert ALONE.all_of([3]) == [3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_added(tmp_path: Path, dtype: torch.dtype) -> None:
    def work(processes: Processes) -> Any:
        everywhere, once, nowhere = (nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for _ in "abc")
        everywhere.grad = torch.full_like(everywhere, processes.rank + 1.0)
        if processes.rank == 1:
            once.grad = torch.full_like(once, 0.25)
        processes.add_gradients([everywhere, once, nowhere])
        assert everywhere.grad is not None
        assert once.grad is not None
        assert nowhere.grad is None
        assert everywhere.grad.dtype == dtype
        return [everywhere.grad.float().tolist(), once.grad.float().tolist()]

    expected = [[[3.0] * 3] * 2, [[0.25] * 3] * 2]
    assert in_processes(2, tmp_path, work) == [expected, expected]


def trained_in(count: int, data: Data, folder: Path, **changes: Any) -> list[Any]:
    return in_processes(
        count, folder / f"meet{count}", lambda _: trained(data, folder / f"of{count}", **changes)
    )


@pytest.mark.parametrize("packing", [False, True])
def test_the_number_of_processes_changes_nothing_but_rounding(
    data: Data, tmp_path: Path, packing: bool
) -> None:
    alone = trained(data, tmp_path / "alone", dropout=0.0, packing=packing)
    for count in (2, 3):
        found = trained_in(count, data, tmp_path, dropout=0.0, packing=packing)
        assert all(one == found[0] for one in found), "every process holds the same bits"
        assert floats(found[0]["losses"]) == pytest.approx(floats(alone["losses"]), rel=1e-4)
        assert floats(found[0]["held_out"]) == pytest.approx(floats(alone["held_out"]), rel=1e-4)
        torch.testing.assert_close(
            torch.tensor(found[0]["weights"]), torch.tensor(alone["weights"]), rtol=0, atol=2e-4
        )


def test_resumed_in_two_processes_to_the_bit(data: Data, tmp_path: Path) -> None:
    def killed(processes: Processes) -> Any:
        whole = trained(data, tmp_path / "whole", packing=True)
        ends = []
        for stop in (1, 4, 7):
            folder = tmp_path / f"stop{stop}"
            first = trained(data, folder, stop=stop, packing=True)
            rest = trained(data, folder, resume=True, packing=True)
            assert first["losses"] + rest["losses"] == whole["losses"]
            ends.append(rest["digest"])
        return [ends, whole["digest"]]

    for ends, whole in in_processes(2, tmp_path / "meet", killed):
        assert ends == [whole] * 3


def test_another_number_of_processes_goes_on_and_says_so(data: Data, tmp_path: Path) -> None:
    in_processes(2, tmp_path / "meet", lambda _: trained(data, tmp_path / "run", stop=4))
    model = with_lora(llama(), dropout=0.2, r=3)
    config = TrainConfig(**CONFIG)
    report = next(train(model, data, config, checkpoints=tmp_path / "run", resume=True))
    assert report.number == 5
    assert any("in 2 processes, this one has 1" in notice for notice in report.notices)


def test_more_processes_than_rows(data: Data, tmp_path: Path) -> None:
    few = data.subset(range(3))
    changes: dict[str, Any] = {"batch_size": 1, "accumulate": 1, "dropout": 0.0}
    changes |= {"eval_share": 0.0, "eval_every": 0}
    alone = trained(few, tmp_path / "alone", **changes)
    found = trained_in(2, few, tmp_path, **changes)
    assert floats(found[0]["losses"]) == pytest.approx(floats(alone["losses"]), rel=1e-5)


def test_rows_with_nan_are_named_in_every_process(data: Data, tmp_path: Path) -> None:
    def work(processes: Processes) -> Any:
        model = with_lora(llama())
        with torch.no_grad():
            model.model.embed_tokens.weight[20] = float("nan")
        with pytest.raises(NonFinite) as caught:
            list(train(model, data, TrainConfig(steps=3, batch_size=8)))
        return [str(caught.value.where), caught.value.what]

    one, other = in_processes(2, tmp_path, work)
    assert one == other
    assert "rows" in one[0]


def test_different_adapters_are_refused(data: Data, tmp_path: Path) -> None:
    def work(processes: Processes) -> Any:
        model = with_lora(llama())
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "@a" in n).add_(processes.rank)
        with pytest.raises(TrainError, match="seed torch before inject"):
            next(train(model, data, TrainConfig(steps=1)))
        return True

    assert in_processes(2, tmp_path, work) == [True, True]


def evaluated_in(count: int, model: Any, rows: Data, names: Any, folder: Path) -> list[Any]:
    def work(processes: Processes) -> Any:
        return evaluate(model, rows, metrics=names, batch_size=4, processes=processes)

    return in_processes(count, folder, work)


def test_evaluation_is_shared_out(tokenizer: Any, data: Data, tmp_path: Path) -> None:
    labelled = load_data(
        [{"text": "ab" * (at % 7) + str(at), "label": at % 2} for at in range(31)], tokenizer
    )
    for model, rows in ((llama(), data), (bert(), labelled)):
        names = ["loss"] if rows is data else None
        alone = evaluate(model, rows, metrics=names, batch_size=4)
        found = evaluated_in(2, model, rows, names, tmp_path / rows.task)
        assert found[0] == found[1]
        assert found[0] == pytest.approx(alone, rel=1e-6)


def test_a_request_to_stop_reaches_every_process(data: Data, tmp_path: Path) -> None:
    def work(processes: Processes) -> Any:
        model = with_lora(llama(), dropout=0.2, r=3)
        steps = train(model, data, TrainConfig(**CONFIG), checkpoints=tmp_path / "run")
        for report in steps:
            if report.number == 3 and processes.rank == 1:
                steps.stop()
        return [report.number, steps.interrupted, str(report.checkpoint)]

    found = in_processes(2, tmp_path / "meet", work)
    assert found == [[4, True, str(tmp_path / "run" / "step-00000004")]] * 2


def test_a_request_during_a_step_reaches_every_process(data: Data, tmp_path: Path) -> None:
    """A signal comes at any moment: here in the forward pass of one process."""

    def work(processes: Processes) -> Any:
        model = with_lora(llama(), dropout=0.2, r=3)
        steps = train(model, data, TrainConfig(**CONFIG), checkpoints=tmp_path / "run")
        report = next(steps)
        if processes.rank == 1:
            model.register_forward_hook(lambda *_: steps.stop())
        for later in steps:
            report = later
        return [report.number, steps.interrupted]

    assert in_processes(2, tmp_path / "meet", work) == [[2, True]] * 2


def test_adapters_trained_together_in_two_processes(data: Data, tmp_path: Path) -> None:
    runs = {
        "a": (data, TrainConfig(steps=4, batch_size=4, learning_rate=1e-2)),
        "b": (data, TrainConfig(steps=3, batch_size=1, learning_rate=1e-2, seed=1)),
    }

    def losses(_: object = None) -> list[dict[str, float]]:
        model = with_lora(with_lora(llama(), "a"), "b", r=3)
        return [
            {name: report.loss for name, report in reports.items()}
            for reports in train_together(model, runs)
        ]

    alone = losses()
    one, other = in_processes(2, tmp_path, losses)
    assert one == other
    assert len(one) == 4
    for found, expected in zip(one, alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
