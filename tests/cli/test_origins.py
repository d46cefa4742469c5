"""What an adapter's folder tells of its training: history, audit, plan against measured, parity."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidepath.analyse import factors_of
from sidepath.store.manifest import NAME, read_manifest, write_manifest
from sidepath.training.history import FILE
from tests.cli.conftest import Run
from tests.cli.watched import Watched, watch
from tests.pages import Collector


@pytest.fixture(scope="module")
def watched(tiny_base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return watch(tiny_base, pairs, tmp_path_factory.mktemp("watched"))


@pytest.fixture
def adapter(watched: Watched, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(watched.adapter, tmp_path / "copy"))


def test_the_record_holds_the_audit_and_the_plan(watched: Watched) -> None:
    record = json.loads((watched.adapter / NAME).read_text())["record"]
    assert record["audit"]["rows"] == 6
    assert 0 < record["audit"]["supervised_share"] < 1
    assert "samples" not in record["audit"], "the user's rows are not published with the adapter"
    assert [portion["name"] for portion in record["audit"]["portions"]] == ["pairs.jsonl"]
    assert record["memory"]["measured"] > record["memory"]["predicted"] > 0, "an evaluation's too"
    size = (watched.adapter / "adapter_model.safetensors").stat().st_size
    assert record["adapter_bytes"]["predicted"] == size


def test_inspect_tells_what_was_watched(run: Run, watched: Watched, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    words = ("--merged", watched.merged, "--html", page, "--json")
    found = run("inspect", watched.adapter, *words).document
    history = found["history"]
    assert len(history["loss"]) == 9
    assert history["loss"][0] == found["record"]["loss"]["first"]
    assert history["loss"][-1] == found["record"]["loss"]["last"]
    assert [step for step, _ in history["held_out"]] == [4, 8, 9]
    assert history["steps"] == [2, 4, 6, 8]
    assert {layer["name"] for layer in history["layers"]} == set(factors_of(watched.adapter))
    planned = {one["what"]: one for one in found["planned"]}
    size = (watched.adapter / "adapter_model.safetensors").stat().st_size
    file = planned["adapter's file"]
    assert file["predicted"] == file["measured"] == size
    assert planned["memory at its peak"]["measured"] == found["record"]["memory"]["measured"]
    parity = json.loads((watched.merged / "parity.json").read_text())
    for name in ("max_abs", "mean_abs", "top1", "kl", "tolerance"):
        assert found["parity"][name] == parity[name]
    text = Collector(page.read_text()).text
    assert f"{parity['max_abs']:.2e}" in text
    assert f"{history['loss'][0]:.4g}" in text
    assert "6 of 6 read" in text
    for said in ("The loss fell", "The effective rank", "The norm of B rose",
                 "The gradient norm fell", "What it was trained on", "Plan against measured",
                 "Merged equals un-merged"):  # fmt: skip
        assert said in text
    pytest.importorskip("matplotlib")
    tags = Collector(page.read_text()).tags
    assert len([attrs for name, attrs in tags if attrs.get("role") == "img"]) == 6


def test_the_last_look_is_what_inspect_finds(
    run: Run, tiny_base: Path, pairs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    flags = f"train --base {tiny_base} --data {pairs} --output {output} --steps 4 --watch 4 --r 2"
    assert run(*flags.split()).code == 0
    document = run("inspect", output, "--json").document
    memory = document["record"]["memory"]
    assert memory["measured"] == pytest.approx(memory["predicted"], rel=0.15)
    norms = {name: factors.B_Or.norm() for name, factors in factors_of(output).items()}
    for layer in document["history"]["layers"]:
        expected = next(one for one in document["layers"] if one["name"] == layer["name"])
        assert layer["effective_rank"] == [pytest.approx(expected["effective_rank"], rel=1e-5)]
        assert layer["b_norm"] == [pytest.approx(float(norms[layer["name"]]), rel=1e-5)]


def test_without_watching_there_is_no_history(run: Run, trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    found = run("inspect", trained, "--html", page, "--json").document
    assert "history" not in found
    assert not (trained / FILE).exists()
    text = Collector(page.read_text()).text
    assert "The loss" not in text
    assert "What it was trained on" in text


def test_a_resumed_command_saves_the_unbroken_history(
    run: Run, tiny_base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flags(output: Path) -> list[str]:
        words = f"train --base {tiny_base} --data {pairs} --output {output} --steps 4 --watch 1"
        return [*words.split(), "--r", "2", "--checkpoint-every", "1", "--dropout", "0.1"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    assert run(*flags(tmp_path / "whole")).code == 0
    with monkeypatch.context() as patch:
        patch.setattr("sidepath.cli.training._measured", killed)
        assert run(*flags(tmp_path / "cut")).code == 130
    assert run(*flags(tmp_path / "cut"), "--resume").code == 0
    whole, cut = (json.loads((tmp_path / one / FILE).read_text()) for one in ("whole", "cut"))
    assert whole == cut
    assert len(cut["loss"]) == 4


def test_a_smaller_adapter_keeps_its_history_but_not_the_planned_size(
    run: Run, watched: Watched, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    assert run("inspect", watched.adapter, "--truncate", "r=1", "--output", small).code == 0
    found = run("inspect", small, "--json").document
    assert len(found["history"]["loss"]) == 9
    assert [one["what"] for one in found["planned"]] == ["memory at its peak"]


def rewrite(folder: Path, files: dict[str, str | None], **record: Any) -> None:
    """Other files (None: no such), and other things on record, in a manifest that lists them."""
    manifest, faults = read_manifest(folder)
    assert manifest is not None, faults
    for name, text in files.items():
        (folder / name).unlink()
        if text is not None:
            (folder / name).write_text(text)
    (folder / NAME).unlink()
    write_manifest(folder, replace(manifest, record={**manifest.record, **record}))


def test_a_bad_history_is_refused_by_name(run: Run, adapter: Path) -> None:
    """With a manifest that vouches for it; without one it is refused before it is read."""
    rewrite(adapter, {FILE: '{"format": 1}'})
    ran = run("inspect", adapter)
    assert ran.code == 2
    assert "the history has faults" in ran.err
    (adapter / FILE).write_text("{}")
    ran = run("inspect", adapter)
    assert ran.code == 2
    assert f"{FILE}: " in ran.err


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"audit": {"rows": 3}}, "audit is malformed"),
        ({"audit": "none"}, "audit is malformed"),
        ({"memory": {"measured": 3}}, "plan is malformed"),
        ({"memory": {"measured": 3, "predicted": "x", "how": ""}}, "plan is malformed"),
        ({"adapter_bytes": [1]}, "plan is malformed"),
        ({"adapter_bytes": {"predicted": 1.5}}, "plan is malformed"),
    ],
)
def test_a_bad_record_is_refused_by_name(
    run: Run, adapter: Path, tmp_path: Path, record: dict[str, Any], said: str
) -> None:
    rewrite(adapter, {}, **record)
    ran = run("inspect", adapter, "--html", tmp_path / "report.html")
    assert ran.code == 2
    assert said in ran.err
    assert not (tmp_path / "report.html").exists()


def test_an_adapter_of_an_earlier_version_has_less_to_tell(run: Run, adapter: Path) -> None:
    rewrite(adapter, {FILE: None}, audit=None, memory=None, adapter_bytes=None)
    found = run("inspect", adapter, "--json").document
    assert "history" not in found
    assert found["planned"] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "malformed"),
        ("[]", "malformed"),
        ('{"adapters": []}', "malformed"),
        ('{"adapters": [{}], "skipped": true}', "malformed"),
        ('{"adapters": [], "max_abs": NaN, "mean_abs": 0, "top1": 1, "kl": 0}', "malformed"),
        ('{"adapters": [{"digest": "0", "name": "x"}], "skipped": true}', "not in that folder"),
    ],
)
def test_a_bad_merged_folder_is_refused_by_name(
    run: Run, adapter: Path, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "parity.json").write_text(text)
    ran = run("inspect", adapter, "--merged", tmp_path)
    assert ran.code == 2
    assert said in ran.err


def test_a_merge_without_parity_is_said_to_be_one(
    run: Run, watched: Watched, tmp_path: Path
) -> None:
    merged, page = tmp_path / "merged", tmp_path / "report.html"
    assert run("merge", watched.base, watched.adapter, merged, "--skip-parity").code == 0
    ran = run("inspect", watched.adapter, "--merged", merged, "--html", page, "--json")
    assert ran.document["parity"] == {"folder": "merged", "skipped": True}
    assert "Merged, and not proved" in page.read_text()


def test_merged_goes_with_one_adapter_and_a_folder_of_merge(
    run: Run, watched: Watched, tmp_path: Path
) -> None:
    both = run("inspect", watched.adapter, watched.adapter, "--merged", watched.merged)
    assert both.code == 2
    assert "--merged goes with one adapter" in both.err
    none = run("inspect", watched.adapter, "--merged", tmp_path)
    assert none.code == 2
    assert "parity.json" in none.err
