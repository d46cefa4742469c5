from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.errors import ResumeError, StoreError, WriteFailed
from sidepath.training import checkpoint
from sidepath.training.checkpoint import Checkpoint, latest, save
from sidepath.training.loop import train
from sidepath.training.report import StepReport
from tests.faults import started
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
    broken: Any
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


def state(step: int) -> Checkpoint:
    tensors = {"model/a": torch.full((50,), float(step)), "best/a": torch.ones(2)}
    return Checkpoint(step, tensors, {"best": {"loss": 1.5}}, {"config": {"seed": 1}})


def rewritten(path: Path, drop: str = "", **changes: Any) -> None:
    """Change a checkpoint's JSON and give it the digest that fits."""
    body = json.loads(path.read_text())
    del body["digest"]
    body |= changes
    body.pop(drop, None)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "digest": digest}))


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << (at % 8)
    path.write_bytes(content)


def swapped(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "removed": Path.unlink,
    "a folder in its place": swapped,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "first bit": lambda path: flipped(path, 0),
    "a bit in the middle": lambda path: flipped(path, path.stat().st_size // 2),
    "last bit": lambda path: flipped(path, -1),
    "another run's": lambda path: path.write_bytes(
        (path.parents[2] / "other" / "step-00000002" / path.name).read_bytes()
    ),
}
JSON_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not an object": (lambda path: path.write_text("[1]"), "digest"),
    "deep": (lambda path: path.write_text("[" * 100_000), "damaged"),
    "not UTF-8": (lambda path: path.write_bytes(b"\xff\xfe{}"), "damaged"),
    "another format": (lambda path: rewritten(path, format=99), "format 99, this version reads"),
    "files is a list": (lambda path: rewritten(path, files=[1]), "damaged"),
    "progress is a list": (lambda path: rewritten(path, progress=[1]), "malformed"),
    "identity is a text": (lambda path: rewritten(path, identity="x"), "malformed"),
    "files names none": (lambda path: rewritten(path, files={}), "damaged"),
    "step is text": (lambda path: rewritten(path, step="2"), "step"),
    "another step": (lambda path: rewritten(path, step=9), "the step in it, 9"),
    **{
        f"without {key}": (partial(rewritten, drop=key), key)
        for key in ("format", "step", "progress", "identity", "files")
    },
}
CASES = {
    **{
        f"{name}: {kind}": (name, damage, "step-00000002 is damaged")
        for name in ("checkpoint.json", "tensors.safetensors")
        for kind, damage in DAMAGES.items()
    },
    **{kind: ("checkpoint.json", *case) for kind, case in JSON_DAMAGES.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_every_damage_falls_back_says_so_and_is_mended_by_the_run(
    tmp_path: Path, case: str
) -> None:
    name, damage, said = CASES[case]
    other = state(2)
    other.tensors["model/a"] += 1
    save(tmp_path / "other", dataclasses.replace(other, progress={"place": 1}), keep=2)
    folder = tmp_path / "run"
    for step in (1, 2):
        save(folder, state(step), keep=2)
    damage(folder / "step-00000002" / name)
    found, notices = latest(folder)
    assert found is not None
    assert found.step == 1
    assert len(notices) == 1
    assert "step-00000002 is damaged (" in notices[0]
    assert said in notices[0]
    assert notices[0].endswith("; an older one is used")
    # With the older one damaged too there is nothing to trust, and both are named.
    shutil.copytree(folder, tmp_path / "both")
    damaged = tmp_path / "both" / "step-00000001" / name
    damaged.write_bytes(b"{")
    with pytest.raises(ResumeError) as caught:
        latest(tmp_path / "both")
    assert [fault.split()[0] for fault in caught.value.faults] == ["step-00000002", "step-00000001"]
    # The run goes on from the older one and comes to the damaged one's step again.
    save(folder, state(2), keep=2)
    found, notices = latest(folder)
    assert found is not None
    assert (found.step, notices) == (2, [])


def test_a_damaged_run_ends_with_the_unbroken_runs_bits(data: Data, tmp_path: Path) -> None:
    whole = fresh()
    expected = run(whole, data, tmp_path / "whole")
    run(fresh(), data, tmp_path / "cut", stop=6)
    for name in ("checkpoint.json", "tensors.safetensors"):
        (tmp_path / "cut" / "step-00000006" / name).write_bytes(b"")
    model = fresh()
    after = run(model, data, tmp_path / "cut", resume=True)
    assert "step-00000006 is damaged" in after[0].notices[0]
    assert [report.loss for report in after] == [report.loss for report in expected[5:]]
    assert same_bits(model, whole)


def test_a_damaged_checkpoint_of_a_later_step_costs_no_good_one(tmp_path: Path) -> None:
    """Resumed from 10 with checkpoints every 5: 15 is the newest good one, 20 stands damaged."""
    for step in (10, 20):
        path = save(tmp_path, state(step), keep=2)
    (path / "checkpoint.json").write_bytes(b"")
    save(tmp_path, state(15), keep=1)
    found, notices = latest(tmp_path)
    assert found is not None
    assert found.step == 15
    assert len(notices) == 1
    save(tmp_path, state(20), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


def test_other_files_in_a_checkpoint_are_not_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, state(1), keep=2)
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="not ours to replace"):
        save(tmp_path, state(1), keep=2)
    assert (path / "thesis.txt").exists()


def test_leftovers_of_every_step_are_cleared_by_resuming_and_by_saving(tmp_path: Path) -> None:
    save(tmp_path, state(5), keep=2)
    names = [
        f".step-0000000{at}.sidepath-0000000{at}.{end}" for at, end in ((3, "new"), (4, "gone"))
    ]
    for act in (lambda: latest(tmp_path), lambda: save(tmp_path, state(5), keep=2)):
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / "tensors.safetensors").write_text("half")
        (tmp_path / ".mine").mkdir(exist_ok=True)
        act()
        assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "step-00000005"]


def test_a_checkpoint_that_a_killed_swap_set_aside_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, state(5), keep=2)
    path.rename(tmp_path / ".step-00000005.sidepath-00000000.old")
    found, notices = latest(tmp_path)
    assert found is not None
    assert (found.step, notices) == (5, [])


def test_a_listing_that_holds_neither_of_two_checkpoints_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one is pruned and the next appears, a folder may be listed without either of them."""
    save(tmp_path, state(5), keep=2)
    numbered, missed = checkpoint._numbered, iter(range(3))
    monkeypatch.setattr(
        checkpoint,
        "_numbered",
        lambda folder: [] if next(missed, None) is not None else numbered(folder),
    )
    found, notices = latest(tmp_path)
    assert found is not None
    assert (found.step, notices) == (5, [])


def test_the_newest_is_read_while_another_process_saves(tmp_path: Path) -> None:
    save(tmp_path, state(1), keep=1)
    child = started(lambda: [save(tmp_path, state(step), keep=1) for step in range(2, 150)])
    seen = [1]
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        found, notices = latest(tmp_path)
        assert found is not None
        assert notices == []
        assert torch.equal(found.tensors["model/a"], torch.full((50,), float(found.step)))
        assert found.step >= seen[-1]
        seen.append(found.step)
    assert latest(tmp_path)[0] is not None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000149"]
    assert len(set(seen)) > 3, "the two did not overlap"


def test_resuming_prunes_what_a_kill_kept_from_being_pruned(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the last save and before its pruning: no later save comes by."""
    with monkeypatch.context() as patch:
        patch.setattr("sidepath.training.checkpoint.prune", lambda *_, **__: None)
        run(fresh(), data, tmp_path)
    assert len(list(tmp_path.iterdir())) == 12
    assert run(fresh(), data, tmp_path, resume=True) == []
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000010", "step-00000011", "step-00000012"]
