"""What train says and does beyond saving an adapter: dry run, forgetting, trackers, memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sidepath.cli.following import drop_checkpoints

from .conftest import Run, write_rows


def flags_of(base: Path, pairs: Path, output: Path, *more: object) -> list[str]:
    flags = f"train --base {base} --data {pairs} --output {output} --steps 4 --r 2 --json"
    return [*flags.split(), "--learning-rate", "0.05", *map(str, more)]


def test_a_dry_run_says_what_would_be_and_writes_nothing(
    run: Run, tiny_base: Path, pairs: Path, tmp_path: Path
) -> None:
    flags = flags_of(tiny_base, pairs, tmp_path / "out", "--dropout", "0.1")
    tried = run(*flags, "--dry-run")
    assert tried.code == 0, tried.err
    assert list(tmp_path.iterdir()) == []
    found = tried.document
    assert found["dry_run"] is True
    assert found["audit"]["rows"] == 8
    assert found["plan"]["memory"]["total"] > 0
    assert found["probe"]["steps"] == 4
    done = run(*flags)
    assert found["probe"]["loss"] == done.document["loss"]["first"], "the very first step's"
    again = run(*flags, "--dry-run")
    assert again.code == 0, "an output that is there stands in nobody's way"


def test_a_dry_run_finds_what_would_not_be_trained(
    run: Run, tiny_base: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " "}])
    ran = run(*flags_of(tiny_base, rows, tmp_path / "out", "--dry-run"))
    assert ran.code == 2
    assert "no row is left" in ran.err


def test_forgetting_is_measured_and_recorded(
    run: Run, tiny_base: Path, pairs: Path, tmp_path: Path
) -> None:
    ran = run(*flags_of(tiny_base, pairs, tmp_path / "out"))
    found = ran.document["forgetting"]
    assert found["source"] == "sampled from the base"
    assert found["difference"] == pytest.approx(found["after"] - found["before"])
    assert found["before"] > 0
    saved = json.loads((tmp_path / "out" / "sidepath.json").read_text())
    assert json.dumps(found) in json.dumps(saved)
    text = write_rows(tmp_path / "text.jsonl", [{"text": "the base's own words"}])
    ran = run(*flags_of(tiny_base, pairs, tmp_path / "own", "--forgetting-data", text))
    assert ran.document["forgetting"]["source"] == str(text)
    ran = run(*flags_of(tiny_base, pairs, tmp_path / "none", "--no-forgetting"))
    assert ran.document["forgetting"] is None


def test_trackers_get_every_step(run: Run, tiny_base: Path, pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ran = run(*flags_of(tiny_base, pairs, tmp_path / "out", "--track", "tensorboard"))
    assert ran.code == 0, ran.err
    events = EventAccumulator(str(next((tmp_path / "out.tracked").rglob("events*")).parent))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert losses[0][1] == pytest.approx(ran.document["loss"]["first"])
    ran = run(*flags_of(tiny_base, pairs, tmp_path / "other", "--track", "tensorbored"))
    assert ran.code == 2
    assert '"tensorboard"' in ran.err


@pytest.mark.parametrize("more", [[], ["--packing", "--max-tokens", "64"]])
def test_memory_is_what_was_predicted(
    run: Run, tiny_base: Path, tmp_path: Path, more: list[str]
) -> None:
    """Rows of many lengths: what was predicted for the longest is measured where it comes by."""
    rows = [{"prompt": "a" * (at % 7 * 4) + f"{at}:", "completion": " bcdefgh"} for at in range(96)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    flags = flags_of(tiny_base, data, tmp_path / "out", "--batch-size", "8", *more)
    ran = run(*flags, "--steps", "12")
    memory = ran.document["memory"]
    assert memory["measured"] == pytest.approx(memory["predicted"], rel=0.15)


def test_packing_and_workers(run: Run, tiny_base: Path, pairs: Path, tmp_path: Path) -> None:
    ran = run(*flags_of(tiny_base, pairs, tmp_path / "one", "--packing", "--batch-size", "1"))
    assert ran.code == 0, ran.err
    flags = flags_of(tiny_base, pairs, tmp_path / "two", "--packing", "--batch-size", "1")
    two = run(*flags, "--workers", "1")
    assert two.document["loss"] == ran.document["loss"]


def test_paged_state_needs_a_gpu(run: Run, tiny_base: Path, pairs: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    flags = flags_of(tiny_base, pairs, tmp_path / "out", "--optimizer", "paged_adamw_8bit")
    ran = run(*flags)
    assert ran.code == 2
    assert "--optimizer adamw" in ran.err


def test_a_failed_measurement_does_not_cost_the_adapter(
    run: Run, tiny_base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr("sidepath.cli.training.forgetting", broken)
    ran = run(*flags_of(tiny_base, pairs, tmp_path / "out"))
    assert ran.code == 0
    assert "forgetting could not be measured: no such thing" in ran.err
    assert ran.document["forgetting"] is None
    assert (tmp_path / "out" / "sidepath.json").exists()


def test_text_for_forgetting_is_read_before_training(
    run: Run, tiny_base: Path, pairs: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "none.jsonl"
    ran = run(*flags_of(tiny_base, pairs, tmp_path / "out", "--forgetting-data", missing))
    assert ran.code == 2
    assert "step 1/" not in ran.err


def test_a_run_killed_before_its_adapter_was_saved_is_recorded_whole(
    run: Run, tiny_base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps were done, none is left for the resumed command: they are counted all the same."""
    flags = flags_of(tiny_base, pairs, tmp_path / "out", "--checkpoint-every", "2")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sidepath.cli.training._measured", killed)
        assert run(*flags).code == 130
    done = run(*flags, "--resume")
    assert done.document["steps"] == 4
    saved = json.loads((tmp_path / "out" / "sidepath.json").read_text())
    assert saved["record"]["steps"] == 4


def test_what_the_save_would_not_replace_is_refused_before_training(
    run: Run, tiny_base: Path, pairs: Path, trained: Path, tmp_path: Path
) -> None:
    """A merged model's folder is ours as well, and no adapter may take its place; nor the other
    way round.
    """
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "parity.json").write_text('{"files": {}}')
    words = ("train", "--base", tiny_base, "--data", pairs, "--output", merged, "--steps", 1)
    ran = run(*words, "--overwrite")
    assert ran.code == 2
    assert "no earlier command of this kind wrote" in ran.err
    assert "step 1/1" not in ran.err
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    ran = run("merge", tiny_base, trained, other, "--overwrite")
    assert ran.code == 2
    assert "no earlier command of this kind wrote" in ran.err


def test_checkpoints_that_cannot_be_deleted_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is saved by then."""
    left = tmp_path / "a.checkpoints" / "step-1"
    left.mkdir(parents=True)
    (left / "checkpoint.json").write_text('{"files": {}}')

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refused)
    drop_checkpoints(tmp_path / "a")
    monkeypatch.undo()
    drop_checkpoints(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
