"""New tokens from the command line: trained, asked, measured, merged, inspected, converted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sidepath.store.new_tokens import NAME

from .conftest import Run, write_rows
from .test_journey import greedy


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts that begin with a token of their own, and completions that end with another."""
    made = [{"prompt": f"<sql>{n}:", "completion": f"{n}<end>"} for n in range(8)]
    return write_rows(tmp_path_factory.mktemp("new") / "rows.jsonl", made)


@pytest.fixture(scope="module")
def words(tiny_base: Path, rows: Path) -> list[str]:
    named = ["--new-tokens", "<sql>", "--new-tokens", "<end>"]
    flags = f"train --base {tiny_base} --data {rows} --r 2 --steps 40 --learning-rate 0.03"
    return [*flags.split(), *named]


@pytest.fixture(scope="module")
def adapter(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sidepath.cli import main

    output = tmp_path_factory.mktemp("adapters") / "tokens"
    assert main([*words, "--output", str(output)]) == 0
    return output


def test_train_counts_them_and_saves_only_their_rows(
    run: Run, words: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    ran = run(*words, "--output", tmp_path / "a", "--json")
    assert ran.code == 0, ran.err
    assert "<sql> in 8, <end> in 8" in ran.err
    assert ran.document["loss"]["last"] < 0.9 * ran.document["loss"]["first"]
    assert json.loads((tmp_path / "a" / NAME).read_text()) == {"<sql>": 259, "<end>": 260}
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert ran.document["plan"]["adapter_bytes"] == size
    flags = ("--r", 2, "--new-tokens", "<sql>", "--new-tokens", "<end>", "--json")
    planned = run("plan", tiny_base, *flags).document
    assert planned["adapter_bytes"] == size
    assert planned["trainable"] == ran.document["plan"]["trainable"]
    assert {"pattern": "tokens", "matched": 2} in planned["targets"]


def test_it_answers_with_them(
    run: Run, adapter: Path, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    asked = ("--base", tiny_base, "--adapter", adapter, "--json")
    texts = run("generate", *asked, "--data", rows, "--max-new-tokens", 6).document["outputs"]
    assert any("<end>" in one["text"] for one in texts)
    adapted = run("eval", *asked, "--data", rows, "--metrics", "loss").document["metrics"]
    assert adapted["loss"] < 4.9
    merged = tmp_path / "merged"
    ran = run("merge", tiny_base, adapter, merged, "--json")
    assert ran.code == 0, ran.err
    assert ran.document["parity"]["max_abs"] < 1e-4
    own = run("eval", "--base", merged, "--data", rows, "--metrics", "loss", "--json")
    assert own.document["metrics"]["loss"] == pytest.approx(adapted["loss"], rel=1e-4)
    assert (
        run("generate", "--base", merged, "--data", rows, "--max-new-tokens", 6, "--json").document[
            "outputs"
        ]
        == texts
    )
    assert greedy(merged, None, ("<sql>3:",))[0][1] == 259


def test_it_is_shown_converted_and_combined(
    run: Run, adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    shown = run("inspect", adapter, "--json").document["tokens"]
    assert [(one["token"], one["id"], one["module"]) for one in shown] == [
        (text, i, module)
        for module in ("lm_head", "model.embed_tokens")
        for text, i in (("<sql>", 259), ("<end>", 260))
    ]
    assert run("convert", adapter, tmp_path / "peft", "--to", "peft").code == 0
    assert (tmp_path / "peft" / NAME).read_bytes() == (adapter / NAME).read_bytes()
    back = run(
        "convert", tmp_path / "peft", tmp_path / "back", "--to", "sidepath", "--base", tiny_base
    )
    assert back.code == 0, back.err
    weights = "adapter_model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (adapter / weights).read_bytes()
    assert NAME in json.loads((tmp_path / "back" / "sidepath.json").read_text())["files"]
    for target in ("gguf", "mlx", "loralib"):
        ran = run("convert", adapter, tmp_path / target, "--to", target, "--base", tiny_base)
        assert (ran.code, "rows of tokens" in ran.err) == (2, True), (target, ran.err)
    checked = run("convert", adapter, "--for", "vllm")
    assert "trainable_tokens_delta" in checked.out + checked.err
    assert run("combine", adapter, tmp_path / "itself").code == 0
    assert (tmp_path / "itself" / NAME).read_bytes() == (adapter / NAME).read_bytes()
    twice = run("combine", adapter, adapter, tmp_path / "two")
    assert (twice.code, "rows of tokens stand" in twice.err) == (2, True)
    smaller = run("inspect", adapter, "--truncate", "r=1", "--output", tmp_path / "one")
    assert smaller.code == 0, smaller.err
    assert (tmp_path / "one" / NAME).read_bytes() == (adapter / NAME).read_bytes()
    grown = tmp_path / "grown"
    assert run("merge", tiny_base, adapter, grown, "--skip-parity").code == 0
    ran = run("extract", tiny_base, grown, tmp_path / "out", "--r", 2)
    assert (ran.code, "shape [259, 16] in the base" in ran.err) == (2, True), ran.err


def test_tokens_of_the_tokenizer_that_the_base_does_not_know(
    run: Run, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    """The user added them to the folder's tokenizer, and the base has no rows for them."""
    from transformers import AutoTokenizer

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<sql>", "<end>"])
    tokenizer.save_pretrained(base)
    output = tmp_path / "a"
    flags = f"train --base {base} --data {rows} --output {output} --steps 2"
    ran = run(*flags.split())
    assert ran.code == 0, ran.err
    assert "2 tokens of the tokenizer are new to the base, which has 259 rows" in ran.err
    assert json.loads((output / NAME).read_text()) == {"<sql>": 259, "<end>": 260}
    asked = run("generate", "--base", base, "--adapter", output, "--prompt", "<sql>1", "--json")
    assert asked.code == 0, asked.err
    ran = run(*flags.replace(str(output), str(tmp_path / "b")).split(), "--method", "bitfit")
    assert (ran.code, "LoRA alone" in ran.err) == (2, True), ran.err


def test_what_cannot_be_is_said(
    run: Run, tiny_base: Path, pairs: Path, adapter: Path, tmp_path: Path
) -> None:
    flags = f"train --base {tiny_base} --data {pairs} --output {tmp_path / 'a'} --steps 1"
    ran = run(*flags.split(), "--new-tokens", "<never>")
    assert (ran.code, "no row of the data holds any of the new tokens" in ran.err) == (2, True)
    assert not (tmp_path / "a").exists()
    ran = run(*flags.split(), "--new-tokens", "")
    assert (ran.code, "cannot be tokens" in ran.err) == (2, True)
    ran = run("serve", "--base", tiny_base, "--adapters", adapter, "--port", 0)
    assert (ran.code, "it brings tokens" in ran.err) == (2, True), ran.err
