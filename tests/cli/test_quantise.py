"""`--quantise nf4` from the command line: train, eval, generate and merge over a 4-bit base."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from sidepath.cli.bases import load_causal, load_classifier
from sidepath.core.quant import is_packed
from sidepath.errors import ConfigError

from .conftest import Run

NF4 = ("--quantise", "nf4")


@pytest.fixture
def packed_adapter(run: Run, tiny_base: Path, pairs: Path, tmp_path: Path) -> Path:
    """An adapter trained over the tiny base in 4 bits."""
    words = ("--base", tiny_base, "--data", pairs, "--output", tmp_path / "a", "--steps", 3)
    ran = run("train", *words, "--r", 2, "--learning-rate", 0.05, *NF4)
    assert ran.code == 0, ran.err
    return tmp_path / "a"


def test_over_a_packed_base_and_over_the_plain_one(
    run: Run, tiny_base: Path, pairs: Path, packed_adapter: Path
) -> None:
    record = json.loads((packed_adapter / "sidepath.json").read_text())
    dtypes = {entry[0] for entry in record["base"]["fingerprint"]["tensors"].values()}
    assert dtypes == {"BF16", "NF4-BF16-64-256"}
    assert 'quantise = "nf4"  # flag' in (packed_adapter / "settings.toml").read_text()
    losses = {}
    for flags in (NF4, (), ("--dtype", "float32", *NF4)):
        words = ("--base", tiny_base, "--adapter", packed_adapter, "--data", pairs)
        ran = run("eval", *words, "--metrics", "loss", "--json", *flags)
        assert ran.code == 0, ran.err
        losses[flags] = ran.document["metrics"]["loss"]
    assert len(set(losses.values())) == 3, "each computes in its own way"
    assert max(losses.values()) - min(losses.values()) < 0.1
    prompt = ("--base", tiny_base, "--adapter", packed_adapter, "--prompt", "count 3:")
    ran = run("generate", *prompt, "--json", "--max-new-tokens", 4, *NF4)
    assert ran.code == 0, ran.err
    assert len(ran.document["outputs"]) == 1


def test_a_start_at_the_residual(run: Run, tiny_base: Path, pairs: Path, tmp_path: Path) -> None:
    words = ("--base", tiny_base, "--data", pairs, "--steps", 1, "--start", "loftq")
    ran = run("train", *words, "--output", tmp_path / "a", *NF4)
    assert ran.code == 0, ran.err
    ran = run("train", *words, "--output", tmp_path / "b")
    assert (ran.code, ran.out) == (2, "")
    assert "needs a quantised base" in ran.err


def test_merging_says_what_quantising_again_leaves(
    run: Run, tiny_base: Path, packed_adapter: Path, tmp_path: Path
) -> None:
    ran = run("merge", tiny_base, packed_adapter, tmp_path / "out", "--json", *NF4)
    assert ran.code == 0, ran.err
    left = ran.document["requantised"]
    assert {"share", "relative_error", "layers"} == set(left)
    assert 0 < left["share"] < 1.5
    assert len(left["layers"]) == ran.document["dequantised"] == 14
    assert set(left["layers"][0]) == {"name", "share", "relative_error"}
    parity = ran.document["parity"]
    assert parity["max_abs"] <= parity["tolerance"]
    ran = run("merge", tiny_base, packed_adapter, tmp_path / "again", *NF4)
    assert "14 weights of the 4-bit base were dequantised" in ran.out
    assert "this is left of the update" in ran.out


def test_stored_packed_folders_need_no_flag(tiny_base: Path, tmp_path: Path) -> None:
    model = load_causal(tiny_base, "auto", "cpu", "nf4")
    model.save_pretrained(tmp_path / "packed")  # type: ignore[operator]
    for quantise in ("none", "nf4"):
        again = load_causal(tmp_path / "packed", "auto", "cpu", quantise)
        assert sum(is_packed(module) for module in again.modules()) == 14
    config = tmp_path / "packed" / "config.json"
    values = json.loads(config.read_text())
    values["quantization_config"] |= {"load_in_4bit": False, "load_in_8bit": True}
    config.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="stored quantised in another way"):
        load_causal(tmp_path / "packed", "auto", "cpu", "nf4")


def test_inspect_over_a_packed_folder(
    run: Run, tiny_base: Path, packed_adapter: Path, tmp_path: Path
) -> None:
    model = load_causal(tiny_base, "auto", "cpu", "nf4")
    model.save_pretrained(tmp_path / "packed")  # type: ignore[operator]
    ran = run("inspect", packed_adapter, "--base", tmp_path / "packed", "--json")
    assert ran.code == 0, ran.err
    assert "14 weights of the base are stored quantised" in ran.err
    assert {layer["relative_norm"] for layer in ran.document["layers"]} == {None}


def test_a_new_head_is_not_packed(tiny_base: Path, tmp_path: Path) -> None:
    load_causal(tiny_base, "auto", "cpu", "nf4").save_pretrained(tmp_path)  # type: ignore[operator]
    for folder, quantise in ((tiny_base, "nf4"), (tmp_path, "none")):
        model, fresh = load_classifier(folder, ("a", "b"), 0, "auto", "cpu", quantise)
        assert fresh == ("score",)
        assert not is_packed(model.get_submodule("score"))
        assert sum(is_packed(module) for module in model.modules()) == 14
        assert torch.isfinite(model(torch.tensor([[5, 6]])).logits).all()


def test_a_classifier_merges_into_a_packed_folder(
    run: Run, tiny_base: Path, labelled: Path, tmp_path: Path
) -> None:
    load_causal(tiny_base, "auto", "cpu", "nf4").save_pretrained(tmp_path / "q")  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "q" / name).write_bytes((tiny_base / name).read_bytes())
    words = ("--base", tmp_path / "q", "--data", labelled, "--output", tmp_path / "a")
    ran = run("train", *words, "--steps", 2, "--r", 2)
    assert ran.code == 0, ran.err
    ran = run("merge", tmp_path / "q", tmp_path / "a", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["dequantised"] == 14


def test_without_bitsandbytes(
    run: Run, tiny_base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    words = ("--base", tiny_base, "--data", pairs, "--output", tmp_path / "a")
    ran = run("train", *words, *NF4)
    assert (ran.code, ran.out) == (2, "")
    assert "pip install 'sidepath[quant]'" in ran.err
    ran = run("train", *words, "--quantise", "int3")
    assert (ran.code, ran.out) == (2, "")
    assert "nf4" in ran.err
