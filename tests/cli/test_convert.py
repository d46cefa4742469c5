"""The verb convert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Run


@pytest.mark.parametrize("name", ["mlx", "gguf", "loralib", "kohya", "diffusers"])
def test_there_and_back(
    name: str, run: Run, adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    between = tmp_path / "between"
    ran = run("convert", adapter, between, "--to", name, "--base", tiny_base, "--json")
    assert ran.code == 0, ran.err
    found = ran.document
    assert (found["from"], found["to"], found["output"]) == ("sidepath", name, str(between))
    assert {layer["r"] for layer in found["layers"]} == {2}
    assert found["base"].startswith("sha256:")
    ran = run("convert", between, tmp_path / "back", "--to", "sidepath", "--base", tiny_base)
    assert ran.code == 0, ran.err
    weights = "adapter_model.safetensors"
    assert (adapter / weights).read_bytes() == (tmp_path / "back" / weights).read_bytes()
    record = json.loads((tmp_path / "back" / "sidepath.json").read_text())["record"]
    assert record["converted_from"] == name
    ran = run("generate", "--base", tiny_base, "--adapter", tmp_path / "back", "--prompt", "a")
    assert ran.code == 0, ran.err


def test_peft_without_and_with_the_base(
    run: Run, adapter: Path, tiny_base: Path, other_base: Path, tmp_path: Path
) -> None:
    assert run("convert", adapter, tmp_path / "peft", "--to", "peft").code == 0
    ran = run("convert", tmp_path / "peft", tmp_path / "ours", "--to", "sidepath")
    assert "not verified" in ran.out
    again = ("--to", "sidepath", "--overwrite", "--base", tiny_base)
    ran = run("convert", tmp_path / "peft", tmp_path / "ours", *again)
    assert (ran.code, "Traceback" in ran.err) == (0, False), ran.err
    ran = run("convert", adapter, tmp_path / "x", "--to", "sidepath", "--base", other_base)
    assert ran.code == 2
    assert "another base" in ran.err


def test_the_check_for_vllm_writes_nothing(run: Run, adapter: Path, tmp_path: Path) -> None:
    ran = run("convert", adapter, "--for", "vllm", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["accepted"] is True
    assert ran.document["max_lora_rank"] == 8
    assert "--max-lora-rank 8" in run("convert", adapter, "--for", "vllm").out
    ran = run("convert", adapter, tmp_path / "vllm", "--to", "peft", "--for", "vllm")
    assert ran.code == 0, ran.err
    assert not (tmp_path / "vllm" / "sidepath.json").exists()


def test_an_output_that_is_there(run: Run, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_text("mine")
    ran = run("convert", adapter, file, "--to", "loralib")
    assert (ran.code, file.read_text()) == (2, "mine")
    assert "--overwrite" in ran.err
    assert run("convert", adapter, file, "--to", "loralib", "--overwrite").code == 0
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    ran = run("convert", adapter, folder, "--to", "mlx", "--overwrite")
    assert ran.code == 2
    assert (folder / "mine").read_text() == "mine"
    for name in ("peft", "mlx"):
        for flags in ([], ["--overwrite"]):
            ran = run("convert", adapter, tmp_path / name, "--to", name, *flags)
            assert ran.code == 0, ran.err
        ran = run("convert", adapter, tmp_path / name, "--to", name)
        assert (ran.code, "--overwrite" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("IN", "nothing to convert to"),
        ("IN OUT", "nothing to convert to"),
        ("IN --to mlx", "a place to write to"),
        ("IN OUT --for vllm", "an output without --to"),
        ("IN OUT --to mlx --for vllm", "for_ = 'vllm'"),
        ("IN OUT --to onnx", "one of sidepath, peft"),
        ("IN OUT --to gguf", "give the base's folder"),
        ("NONE OUT --to mlx", "no such adapter"),
        ("IN OUT --to loralib --fused c_attn=121", "fused"),
        ("IN OUT --to mlx --base NONE", "no such base folder"),
        ("IN OUT --to peft --from mlx", "lora_parameters"),
        ("IN OUT --to mlx --frm peft", "--from"),
    ],
)
def test_bad_input(arguments: str, said: str, run: Run, adapter: Path, tmp_path: Path) -> None:
    places = {"IN": adapter, "OUT": tmp_path / "out", "NONE": tmp_path / "none"}
    ran = run("convert", *[places.get(word, word) for word in arguments.split()])
    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()
