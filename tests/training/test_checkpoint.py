from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sidepath.config import TrainConfig
from sidepath.errors import ResumeError, WriteFailed
from sidepath.training.data import Data, load_data
from sidepath.training.loop import train
from sidepath.training.report import StepReport
from tests.training.kit import bert, llama, with_lora

CONFIG: dict[str, Any] = {
    "steps": 12,
    "batch_size": 3,
    "accumulate": 2,
    "learning_rate": 2e-2,
    "checkpoint_every": 1,
    "eval_every": 2,
    "eval_share": 0.2,
    "weight_decay": 0.01,
    "keep_checkpoints": 3,
}


@pytest.fixture
def data(tokenizer: Any, pairs: Any) -> Data:
    return load_data(pairs, tokenizer)


def fresh(seed: int = 0) -> Any:
    return with_lora(llama(seed=seed), dropout=0.2, r=3)


def run(
    model: Any, data: Data, folder: Path, *, stop: int = 99, resume: bool = False, **changes: Any
) -> list[StepReport]:
    reports = []
    config = TrainConfig(**{**CONFIG, **changes})
    steps = train(model, data, config, checkpoints=folder, resume=resume)
    for report in steps:
        reports.append(report)
        if report.number == stop:
            steps.close()  # type: ignore[attr-defined]
            break
    return reports


def same_bits(one: Any, other: Any) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def labelled(tokenizer: Any) -> Data:
    rows = [{"text": "ab" * (at % 7) + str(at), "label": at % 2} for at in range(30)]
    return load_data(rows, tokenizer)


@pytest.mark.parametrize("kind", ["LoRA on a causal model", "classifier, fully, with dropout"])
def test_a_resumed_run_has_the_unbroken_runs_bits(
    data: Data, labelled: Data, tmp_path: Path, kind: str
) -> None:
    make, rows = (fresh, data) if kind.startswith("LoRA") else (bert, labelled)
    whole = make()
    expected = run(whole, rows, tmp_path / "whole")
    assert len({report.loss for report in expected}) == 12
    for stop in (1, 4, 7, 11):
        folder = tmp_path / f"stop{stop}"
        run(make(), rows, folder, stop=stop)
        model = make()
        torch.manual_seed(999)
        after = run(model, rows, folder, resume=True)
        assert [r.number for r in after] == list(range(stop + 1, 13))
        for report, other in zip(after, expected[stop:], strict=True):
            assert report.loss == other.loss
            assert report.gradient_norm == other.gradient_norm
            assert report.learning_rate == other.learning_rate
            assert report.held_out == other.held_out
            assert report.best == other.best
        assert same_bits(model, whole)


def test_a_run_between_two_checkpoints_goes_back_to_the_last(data: Data, tmp_path: Path) -> None:
    expected = run(fresh(), data, tmp_path / "whole", checkpoint_every=4)
    run(fresh(), data, tmp_path / "cut", checkpoint_every=4, stop=6)
    after = run(fresh(), data, tmp_path / "cut", checkpoint_every=5, resume=True)
    assert after[0].notices == ("resumed after step 4",)
    assert [report.loss for report in after] == [report.loss for report in expected[4:]]


def test_old_checkpoints_go_and_the_newest_is_found_by_number(data: Data, tmp_path: Path) -> None:
    reports = run(fresh(), data, tmp_path, keep_checkpoints=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000011", "step-00000012"]
    assert reports[-1].checkpoint == tmp_path / "step-00000012"
    names = {path.name for path in (tmp_path / "step-00000012").iterdir()}
    assert names == {"checkpoint.json", "tensors.safetensors"}


def test_resuming_before_the_first_checkpoint_starts_anew(data: Data, tmp_path: Path) -> None:
    reports = run(fresh(), data, tmp_path / "none", resume=True, stop=1)
    assert reports[0].number == 1
    assert "started from the beginning" in reports[0].notices[0]


def test_a_new_run_does_not_mix_with_an_old_one(data: Data, tmp_path: Path) -> None:
    run(fresh(), data, tmp_path, stop=2)
    with pytest.raises(ResumeError, match="checkpoints of an earlier run"):
        run(fresh(), data, tmp_path)


def test_every_difference_is_named(data: Data, tmp_path: Path, tokenizer: Any) -> None:
    run(fresh(), data, tmp_path, stop=2)
    with pytest.raises(ResumeError) as caught:
        run(fresh(), data.subset(range(20)), tmp_path, resume=True, learning_rate=0.1, seed=4)
    named = {fault.split(":")[0] for fault in caught.value.faults}
    assert named == {"config.learning_rate", "config.seed", "data.digest", "held_out.digest"}
    with pytest.raises(ResumeError, match=r"adapter\.r: the checkpoint has 3, this run 2"):
        run(with_lora(llama(), dropout=0.2), data, tmp_path, resume=True)
    with pytest.raises(ResumeError, match="base:"):
        run(fresh(seed=1), data, tmp_path, resume=True)


@pytest.mark.parametrize("name", ["checkpoint.json", "tensors.safetensors"])
def test_a_damaged_checkpoint_gives_way_to_an_older_one(
    data: Data, tmp_path: Path, name: str
) -> None:
    expected = run(fresh(), data, tmp_path / "whole")
    folder = tmp_path / "cut"
    run(fresh(), data, folder, stop=5)
    for newest, place in (("step-00000005", 0.3), ("step-00000004", 0.7)):
        path = folder / newest / name
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 4
        path.write_bytes(content)
    after = run(fresh(), data, folder, resume=True)
    assert [report.loss for report in after] == [report.loss for report in expected[3:]]
    assert "step-00000005 is damaged" in after[0].notices[0]
    assert "step-00000004 is damaged" in after[0].notices[1]
    for path in folder.glob("*/" + name):
        path.write_bytes(b"")
    with pytest.raises(ResumeError, match="no checkpoint of the run can be trusted"):
        run(fresh(), data, folder, resume=True)


def test_every_kind_of_damage_to_the_state_is_seen(data: Data, tmp_path: Path) -> None:
    run(fresh(), data, tmp_path, stop=1, keep_checkpoints=1)
    path = tmp_path / "step-00000001" / "checkpoint.json"
    whole = json.loads(path.read_text())
    for broken in ([], {}, {**whole, "step": 2}, {**whole, "format": 9}, {**whole, "files": {}}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ResumeError, match="can be trusted"):
            run(fresh(), data, tmp_path, resume=True)
    path.unlink()
    with pytest.raises(ResumeError, match="can be trusted"):
        run(fresh(), data, tmp_path, resume=True)


def test_a_finished_run_resumes_to_its_best_state(data: Data, tmp_path: Path) -> None:
    model = fresh()
    run(model, data, tmp_path, learning_rate=0.5, eval_every=1)
    again = fresh()
    assert run(again, data, tmp_path, learning_rate=0.5, eval_every=1, resume=True) == []
    assert same_bits(model, again)


def test_a_checkpoint_that_cannot_be_written(data: Data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = fresh()
    with pytest.raises(WriteFailed):
        run(model, data, tmp_path / "file")
    assert not model.training
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
