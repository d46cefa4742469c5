"""`serve --engine vllm`: the command, and adapters that vLLM would not take."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

from .conftest import Run


def changed(folder: Path, copy: Path, **settings: object) -> Path:
    """A copy of an adapter of PEFT's kind with other settings."""
    shutil.copytree(folder, copy)
    (copy / "sidepath.json").unlink()
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return copy


def test_the_command_names_base_and_adapters(run: Run, tiny_base: Path, trained: Path) -> None:
    ran = run(
        "serve", "--engine", "vllm", "--base", tiny_base, "--adapters", trained, "--name", "tiny",
        "--slots", "4", "--port", "8100", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    words = json.loads(ran.out)["command"]
    assert words[:3] == ["vllm", "serve", str(tiny_base)]
    after = dict(pairwise(words))
    assert after["--served-model-name"] == "tiny"
    assert after["--host"] == "127.0.0.1"
    assert after["--port"] == "8100"
    assert after["--max-loras"] == "1", "no more slots than adapters"
    assert after["--max-lora-rank"] == "8"
    assert words[-1] == f"{trained.name}={trained}"
    plain = run("serve", "--engine", "vllm", "--base", tiny_base, "--name", "tiny")
    assert plain.out.startswith("vllm serve ")
    assert "--enable-lora" not in plain.out


def test_every_adapter_that_vllm_does_not_take_is_named(
    run: Run, tiny_base: Path, other_base: Path, trained: Path, tmp_path: Path
) -> None:
    changed(trained, tmp_path / "scaled", alpha_pattern={"q_proj": 3})
    changed(trained, tmp_path / "dora", use_dora=True)
    shutil.copytree(trained, tmp_path / "good")
    words = ("serve", "--engine", "vllm", "--base", tiny_base, "--adapters", tmp_path)
    ran = run(*words)
    assert (ran.code, ran.out) == (2, "")
    assert "vLLM does not take 2 of 3 adapters as they are" in ran.err
    assert "scaled" in ran.err
    assert "dora" in ran.err
    assert "Traceback" not in ran.err
    other = run("serve", "--engine", "vllm", "--base", other_base, "--adapters", trained)
    assert other.code == 2
    assert "vLLM does not take 1 of 1" in other.err


def test_a_base_of_the_hub_is_called_as_its_repository(
    run: Run, tiny_base: Path, tmp_path: Path
) -> None:
    place = tmp_path / "models--me--tiny" / "snapshots" / ("a1" * 20)
    shutil.copytree(tiny_base, place)
    words = run("serve", "--engine", "vllm", "--base", place, "--json").document["command"]
    assert dict(pairwise(words))["--served-model-name"] == "tiny"
