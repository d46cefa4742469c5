"""A fusion from the command line: adapters trained, composed, measured, and every fault told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sidepath.cli import main

from .conftest import Run, write_rows

BOTTLENECK = "--method bottleneck --kind pfeiffer --size 4 --start near-identity"
QUICK = "--steps 2 --batch-size 4 --learning-rate 0.05 --no-forgetting"


def rows_of(word: str, folder: Path) -> Path:
    rows = [{"prompt": f"count {n}:", "completion": f" {word} {n}"} for n in range(8)]
    return write_rows(folder / f"{word}.jsonl", rows)


def trained_on(word: str, folder: Path, base: Path | None = None, method: str = BOTTLENECK) -> Path:
    """The folder of an adapter that the command line trained for one word."""
    words = ["train", "--data", rows_of(word, folder), "--output", folder / word]
    words += ["--base", base] if base else []
    assert main([str(item) for item in [*words, *QUICK.split(), *method.split()]]) == 0
    return folder / word


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two bottlenecks of the embedded base, `one` and `two`."""
    folder = tmp_path_factory.mktemp("embedded")
    for word in ("one", "two"):
        trained_on(word, folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two` of the tiny base, and `f` that composes them."""
    folder = tmp_path_factory.mktemp("tiny")
    for word in ("one", "two"):
        trained_on(word, folder, tiny_base)
    trained_on("f", folder, tiny_base, f"--method fusion {beside(folder)}")
    return folder


def beside(folder: Path) -> str:
    return f"--beside one={folder / 'one'} --beside two={folder / 'two'}"


def test_two_bottlenecks_are_fused_measured_and_answer(
    run: Run, embedded: Path, tmp_path: Path
) -> None:
    data, fused = rows_of("one", tmp_path), tmp_path / "fused"
    before = (embedded / "one" / "adapter_model.safetensors").read_bytes()
    words = f"train --method fusion --data {data} --eval-data {data} --output {fused} --json"
    ran = run(*words.split(), *QUICK.split(), *beside(embedded).split())
    assert ran.code == 0, ran.err
    size = (fused / "adapter_model.safetensors").stat().st_size
    assert ran.document["plan"]["adapter_bytes"] == pytest.approx(size, rel=0.01)
    saved = json.loads((fused / "sidepath.json").read_text())
    assert saved["config"]["adapters"] == ["one", "two"]
    assert (embedded / "one" / "adapter_model.safetensors").read_bytes() == before
    measured = run("eval", "--adapter", fused, "--data", data, "--metrics", "loss", "--json",
                   *beside(embedded).split())  # fmt: skip
    assert measured.document["metrics"]["loss"] == pytest.approx(
        ran.document["metrics"]["loss"], rel=1e-4
    )
    alone = run("eval", "--adapter", embedded / "one", "--data", data, "--metrics", "loss",
                "--json")  # fmt: skip
    assert alone.document["metrics"]["loss"] != measured.document["metrics"]["loss"]
    written = run("generate", "--adapter", fused, "--prompt", "count 3:", "--max-new-tokens", 4,
                  "--json", *beside(embedded).split())  # fmt: skip
    assert written.code == 0, written.err
    assert written.document["outputs"][0]["prompt"] == "count 3:"


def test_the_settings_it_saved_train_it_again(run: Run, tiny: Path, tmp_path: Path) -> None:
    again = tmp_path / "f"
    assert run("train", "--config", tiny / "f" / "settings.toml", "--output", again).code == 0
    weights = "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (tiny / "f" / weights).read_bytes()


def test_a_composed_adapter_may_have_the_name_that_answers_take(
    run: Run, tiny: Path, tiny_base: Path, tmp_path: Path
) -> None:
    method = f"--method fusion --beside adapter={tiny / 'one'}"
    folder = trained_on("g", tmp_path, tiny_base, method)
    ran = run("generate", "--base", tiny_base, "--adapter", folder, "--prompt", "a",
              "--max-new-tokens", 1, "--beside", f"adapter={tiny / 'one'}")  # fmt: skip
    assert ran.code == 0, ran.err


def test_places_without_a_fusion_are_counted(run: Run, tiny_base: Path, tmp_path: Path) -> None:
    houlsby = trained_on("h", tmp_path, tiny_base, "--method bottleneck --size 2")
    words = f"train --base {tiny_base} --data {tmp_path / 'h.jsonl'} --output {tmp_path / 'f'}"
    flags = [*words.split(), *QUICK.split(), "--method", "fusion", "--beside", f"h={houlsby}"]
    ran = run(*flags, "--dry-run")
    assert '"h" is silent at 2 of its 4 places, such as model.layers.0.self_attn.o_proj' in ran.err
    ran = run(*flags, "--dry-run", "--targets", "attention-output,mlp-output")
    assert ran.code == 0
    assert "is silent" not in ran.err


def test_classifiers_are_fused_under_a_head_of_the_fusions_own(
    run: Run, tiny_base: Path, labelled: Path, tmp_path: Path
) -> None:
    common = f"train --base {tiny_base} --data {labelled} --eval-data {labelled} {QUICK}".split()
    a, fused = tmp_path / "a", tmp_path / "fused"
    assert run(*common, *BOTTLENECK.split(), "--output", a).code == 0
    ran = run(*common, "--method", "fusion", "--beside", f"a={a}", "--output", fused, "--json")
    assert ran.code == 0, ran.err
    measured = run("eval", "--base", tiny_base, "--data", labelled, "--adapter", fused,
                   "--beside", f"a={a}", "--json")  # fmt: skip
    assert measured.document["metrics"] == pytest.approx(ran.document["metrics"], rel=1e-4)
    keys = json.loads((fused / "sidepath.json").read_text())["tensors"]
    assert "score.weight" in keys


TRAIN = "train --base {base} --data {data} --output {out} --steps 1 --method fusion"
EVAL = "eval --base {base} --data {data} --metrics loss"
FAULTS = {
    "nothing to compose": (TRAIN, ("no bottleneck adapter stands", "--beside NAME=FOLDER")),
    "no such folder": (f"{TRAIN} --beside one={{tiny}}/none", ("no such adapter", "one=", "none")),
    "of another base": (
        f"{TRAIN} --base {{other}} --beside one={{tiny}}/one",
        ("made for another base", "fingerprint"),
    ),
    "one name twice": (f"{TRAIN} --beside a={{tiny}}/one --beside a={{tiny}}/two", ("twice", "a")),
    "no name": (f"{TRAIN} --beside {{tiny}}/one", ("--beside needs KEY=VALUE",)),
    "an impossible name": (f"{TRAIN} --beside a/b={{tiny}}/one", ("'a/b'", "cannot name")),
    "no bottleneck": (
        f"{TRAIN} --beside one={{tiny}}/one --beside lora={{lora}}",
        ('"lora": LowRank beside model.layers.0.mlp.down_proj is no bottleneck',),
    ),
    "a name the fusion has not": (
        f"{TRAIN} --beside one={{tiny}}/one --adapters two",
        ('"two": stands at none of the 2 places',),
    ),
    "beside what composes nothing": (
        f"{TRAIN} --method lora --beside one={{tiny}}/one",
        ("composes no others", "method lora", "expected: method fusion"),
    ),
    "measured without its adapters": (
        f"{EVAL} --adapter {{tiny}}/f",
        ('"one": stands at none', '"two": stands at none', "--beside"),
    ),
    "measured with another in its place": (
        f"{EVAL} --adapter {{tiny}}/f --beside one={{tiny}}/two --beside two={{tiny}}/two",
        ('"one": beside model.layers.0.mlp.down_proj is not the one that was composed',),
    ),
    "measured on another base": (
        f"{EVAL} --base {{other}} --adapter {{tiny}}/f --beside one={{tiny}}/one",
        ("made for another base",),
    ),
    "measured beside what composes nothing": (
        f"{EVAL} --adapter {{lora}} --beside one={{tiny}}/one",
        ("composes no others", "method lora"),
    ),
    "beside a base alone": (f"{EVAL} --beside one={{tiny}}/one", ("impossible value for beside",)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_told_in_one_message(
    run: Run, name: str, tiny: Path, tiny_base: Path, other_base: Path, trained: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    words, fragments = FAULTS[name]
    data = rows_of("one", tmp_path)
    places = {"base": tiny_base, "other": other_base, "data": data, "out": tmp_path / "out"}
    ran = run(*words.format(tiny=tiny, lora=trained, **places).split())
    assert ran.code == 2, ran.err
    assert ran.out == ""
    messages = [line for line in ran.err.splitlines() if line.startswith("sidepath")]
    assert len(messages) == 1, ran.err
    assert "Traceback" not in ran.err
    assert all(fragment in ran.err for fragment in fragments), ran.err
    assert not (tmp_path / "out").exists()
