"""The verb train with several sources of data: flags, settings files, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Run, write_rows


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """A second file, with a comma in its name."""
    rows = [{"prompt": f"double {n}:", "completion": f" {2 * n}"} for n in range(4)]
    return write_rows(tmp_path / "more,data.jsonl", rows)


def words(base: Path, output: Path) -> list[object]:
    return ["train", "--base", base, "--output", output, "--steps", 2, "--r", 2, "--json"]


def trained_on(output: Path) -> Any:
    return json.loads((output / "sidepath.json").read_text())


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_two_files_with_weights(
    run: Run, tiny_base: Path, pairs: Path, more: Path, tmp_path: Path, stream: str
) -> None:
    sources = ["--data", pairs, "--data", more, "--weights", "0.7,0.3", stream]
    ran = run(*words(tiny_base, tmp_path / "out"), *sources)
    assert ran.code == 0, ran.err
    assert ran.document["audit"]["portions"] == [
        {"name": str(pairs), "rows": 8, "weight": 0.7},
        {"name": str(more), "rows": 4, "weight": 0.3},
    ]
    assert ran.document["audit"]["rows"] == 12
    assert "more,data.jsonl" in ran.err
    assert "weight 30.0%" in ran.err
    assert "pairs.jsonl, more,data.jsonl" in json.dumps(trained_on(tmp_path / "out"))
    saved = (tmp_path / "out" / "settings.toml").read_text()
    assert "weights = [0.7, 0.3]  # flag" in saved


@pytest.mark.parametrize("form", ["text", "list"])
def test_data_in_a_settings_file(
    run: Run, tiny_base: Path, pairs: Path, tmp_path: Path, form: str
) -> None:
    value = json.dumps(str(pairs)) if form == "text" else json.dumps([str(pairs)])
    settings = tmp_path / "settings.toml"
    settings.write_text(f"[run]\ndata = {value}\n")
    ran = run(*words(tiny_base, tmp_path / "out"), "--config", settings)
    assert ran.code == 0, ran.err
    assert ran.document["audit"]["rows"] == 8
    again = run(
        *words(tiny_base, tmp_path / "again"), "--config", tmp_path / "out" / "settings.toml"
    )
    assert again.code == 0, again.err
    assert again.document["loss"] == ran.document["loss"]


def test_streamed_rows_train_like_rows_in_memory(
    run: Run, tiny_base: Path, pairs: Path, tmp_path: Path
) -> None:
    losses = [
        run(*words(tiny_base, tmp_path / flag.strip("-")), "--data", pairs, flag).document["loss"]
        for flag in ("--stream", "--no-stream")
    ]
    assert losses[0] == losses[1]


def test_no_data_at_all(run: Run, tiny_base: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("[run]\ndata = []\n")
    ran = run(*words(tiny_base, tmp_path / "out"), "--config", settings)
    assert ran.code == 2
    assert "data" in ran.err
