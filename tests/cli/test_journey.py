"""train, eval, generate, merge, inspect and plan from the command line, one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sidepath.store.parity import Parity
from sidepath.training.report import StepReport

from .conftest import Run, write_rows

PROMPTS = ("count 3:", "count 5:")


def greedy(folder: Path, adapter: Path | None, prompts: tuple[str, ...]) -> list[list[int]]:
    """Greedy tokens by plain transformers; with an adapter, by our loaded side path."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sidepath.store.adapter import load

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter is not None:
        load(model, adapter, "loaded")
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
        found.append(out[0].tolist())
    return found


def test_train_reports_what_the_contract_names(
    run: Run, tiny_base: Path, pairs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    flags = (
        f"--base {tiny_base} --data {pairs} --output {output} --steps 3 --r 2 --eval-data {pairs}"
    )
    ran = run("train", *flags.split(), "--json")
    assert ran.code == 0, ran.err
    found = ran.document
    assert found["adapter"] == str(output)
    assert found["steps"] == 3
    assert found["loss"]["first"] > 0
    assert found["loss"]["last"] > 0
    assert found["metrics"].keys() == {"loss", "perplexity"}
    audit = found["audit"]
    assert (audit["rows"], audit["truncated"], audit["end_token_share"]) == (8, 0, 1.0)
    assert 0 < audit["supervised_share"] < 1
    assert found["peak_memory_bytes"] > 2**20
    assert found["seconds"] > 0
    size = (output / "adapter_model.safetensors").stat().st_size
    assert found["plan"]["adapter_bytes"] == pytest.approx(size, rel=0.01)
    assert ran.err.count("base float32, adapter float32") == 1
    assert ran.err.index("autocast off") < ran.err.index("step 1/3")
    assert "step 3/3" in ran.err


def test_the_settings_of_the_run_are_saved_and_repeat_it(
    run: Run, trained: Path, tmp_path: Path
) -> None:
    settings = trained / "settings.toml"
    assert "steps = 3  # flag" in settings.read_text()
    again = tmp_path / trained.name
    assert run("train", "--config", settings, "--output", again).code == 0
    weights = "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (trained / weights).read_bytes()
    listed = json.loads((trained / "sidepath.json").read_text())
    assert "settings.toml" in listed["files"]
    assert listed["record"]["command"].startswith("sidepath train --base ")


def test_a_killed_run_resumes_to_the_same_bytes(
    run: Run, tiny_base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sidepath.cli import following

    def flags(name: str) -> list[str]:
        words = f"train --base {tiny_base} --data {pairs} --output {tmp_path / name} --steps 6"
        return [*words.split(), "--dropout", "0.1", "--batch-size", "3", "--checkpoint-every", "2"]

    assert run(*flags("unbroken")).code == 0

    def killed(report: StepReport) -> str:
        if report.number == 5:
            raise KeyboardInterrupt
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(following, "_facts", killed)
        ran = run(*flags("broken"))
    assert (ran.code, ran.err.splitlines()[-1]) == (130, "sidepath train: interrupted")
    assert not (tmp_path / "broken").exists()
    ran = run(*flags("broken"), "--resume", "--json")
    assert ran.document["steps"] == 6
    assert "resumed after step 4" in ran.err
    weights = "adapter_model.safetensors"
    first, second = (tmp_path / name / weights for name in ("unbroken", "broken"))
    assert first.read_bytes() == second.read_bytes()


def test_eval_measures_the_adapter_and_the_base(
    run: Run, tiny_base: Path, trained: Path, pairs: Path
) -> None:
    common = f"eval --base {tiny_base} --data {pairs} --max-new-tokens 4 --json".split()
    adapted = run(*common, "--adapter", trained).document
    base = run(*common).document
    assert adapted["rows"] == base["rows"] == 8
    assert adapted["metrics"].keys() == {"loss", "perplexity", "exact_match", "bleu", "rouge_l"}
    assert adapted["metrics"]["loss"] < base["metrics"]["loss"]
    only = run(*common, "--metrics", "loss", "--limit", 3).document
    assert (list(only["metrics"]), only["rows"]) == (["loss"], 3)


def test_generate_from_prompts_and_from_a_file(
    run: Run, tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    common = f"generate --base {tiny_base} --adapter {trained} --max-new-tokens 5 --json".split()
    by_flag = run(*common, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]).document
    by_file = run(*common, "--data", rows).document
    assert by_flag == by_file
    assert [output["prompt"] for output in by_flag["outputs"]] == list(PROMPTS)
    sampled = [*common, "--prompt", PROMPTS[0], "--temperature", "2", "--seed"]
    assert run(*sampled, 1).document == run(*sampled, 1).document
    assert run(*sampled, 1).document != run(*sampled, 2).document


def test_merged_folder_gives_the_adapters_tokens(
    run: Run, tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    found = run("merge", tiny_base, trained, merged, "--json").document
    assert found["output"] == str(merged)
    assert found["parity"].keys() >= {"max_abs", "mean_abs", "top1", "kl"}
    assert found["parity"]["max_abs"] < 1e-4
    assert greedy(merged, None, PROMPTS) == greedy(tiny_base, trained, PROMPTS)
    assert run("merge", tiny_base, trained, merged).code == 2
    skipped = run("merge", tiny_base, trained, merged, "--overwrite", "--skip-parity", "--json")
    assert skipped.document["parity"] is None
    assert "PARITY NOT MEASURED" in skipped.err


def test_parity_is_measured_on_text_of_the_users(
    run: Run, tiny_base: Path, trained: Path, pairs: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("abc\n\nabcdef\n")
    positions = []
    for data in (lines, pairs):
        words = ("merge", tiny_base, trained, tmp_path / "out", "--overwrite", "--json")
        found = run(*words, "--data", data).document
        assert found["parity"]["top1"] == 1.0
        assert found["peak_memory_bytes"]["parity"] > 0
        positions.append(found["parity"]["positions"])
    assert positions[0] < 20 < positions[1]


def test_a_merge_beyond_the_tolerance_is_not_published(
    run: Run, tiny_base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1: neither the input nor the command is wrong."""
    monkeypatch.setattr(Parity, "holds", property(lambda _: False))
    ran = run("merge", tiny_base, trained, tmp_path / "out")
    assert ran.code == 1
    assert "nothing was published" in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


def test_labels_are_learned_by_a_head_trained_whole(
    run: Run, tiny_base: Path, labelled: Path, tmp_path: Path
) -> None:
    output, merged = tmp_path / "classes", tmp_path / "merged"
    words = f"train --base {tiny_base} --data {labelled} --output {output} --epochs 15"
    assert run(*words.split(), "--learning-rate", "0.02", "--seed", "3").code == 0
    sites = json.loads((output / "sidepath.json").read_text())["sites"]
    assert [site["path"] for site in sites if site["kind"] == "whole"] == ["score"]
    measure = f"eval --base {tiny_base} --adapter {output} --data {labelled} --json"
    metrics = run(*measure.split()).document["metrics"]
    assert metrics.keys() == {"loss", "accuracy", "matthews"}
    assert metrics["accuracy"] == 1.0
    text = run("generate", "--base", tiny_base, "--adapter", output, "--prompt", "a")
    assert (text.code, "classifier" in text.err) == (2, True)
    assert run("merge", tiny_base, output, merged).code == 0
    settings = json.loads((merged / "config.json").read_text())
    assert settings["id2label"] == {"0": "0", "1": "1"}


def test_plan_loads_no_weights(run: Run, tiny_base: Path, trained: Path, tmp_path: Path) -> None:
    only_config = tmp_path / "config only"
    only_config.mkdir()
    (only_config / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    found = run("plan", only_config, "--r", 2, "--json").document
    keys = {"method", "trainable", "total", "adapter_bytes", "targets", "memory"}
    assert found.keys() >= keys
    assert found["memory"].keys() >= {
        *("weights", "gradients", "optimizer", "activations", "total"),
    }
    assert found["targets"] == [{"pattern": "all-linear", "matched": 14}]
    size = (trained / "adapter_model.safetensors").stat().st_size
    assert found["adapter_bytes"] == pytest.approx(size, rel=0.01)
    assert "all-linear" in run("plan", only_config).out


def test_an_adapter_of_peft_is_used_with_one_notice(
    run: Run, tiny_base: Path, adapter: Path
) -> None:
    (adapter / "sidepath.json").unlink()
    (adapter / "settings.toml").unlink()
    ran = run("generate", "--base", tiny_base, "--adapter", adapter, "--prompt", "a", "--json")
    assert ran.code == 0
    assert ran.err.count("could not be verified") == 1
    assert run("inspect", adapter, "--json").document["layers"]


def test_real_input_end_to_end(run: Run, stories: Path, e2e: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "e2e", tmp_path / "merged"
    columns = ["--columns", "prompt=mr", "--columns", "completion=ref"]
    common = ["--base", stories, "--data", e2e, *columns, "--json"]
    size = ["--batch-size", 8, "--learning-rate", "0.01", "--steps", 12]
    trained = run("train", *common, "--output", adapter, *size)
    assert trained.code == 0, trained.err
    assert trained.document["loss"]["last"] < 0.8 * trained.document["loss"]["first"]
    assert trained.document["audit"]["rows"] == 200
    tail = ["--limit", 8, "--max-new-tokens", 8]
    adapted = run("eval", *common, "--adapter", adapter, *tail).document
    base = run("eval", *common, *tail).document
    assert adapted["metrics"]["loss"] < base["metrics"]["loss"] - 0.5
    assert run("merge", stories, adapter, merged, "--json").document["parity"]["top1"] == 1.0
    prompts = ("name[Alimentum], area[city centre]", "name[Aromi], eatType[pub]")
    assert greedy(merged, None, prompts) == greedy(stories, adapter, prompts)
    flags = ["generate", "--prompt", prompts[0], "--max-new-tokens", 8, "--json"]
    ours = run(*flags, "--base", stories, "--adapter", adapter).document
    assert ours == run(*flags, "--base", merged).document


def test_standard_error_holds_our_lines_only(run: Run, tiny_base: Path, trained: Path) -> None:
    words = f"generate --base {tiny_base} --adapter {trained} --prompt a --max-new-tokens 2 --json"
    ran = run(*words.split())
    assert ran.document["outputs"][0]["prompt"] == "a"
    assert ran.err == "prompts 1/1\n"


def test_as_a_process(trained: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "sidepath", "inspect", trained, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(json.loads(ran.stdout)["layers"]) == 14


def test_plan_takes_the_config_file_alone_and_tells_the_share_of_a_gpu(
    run: Run, tiny_base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.json"
    file.write_bytes((tiny_base / "config.json").read_bytes())
    found = run("plan", file, "--gpu-gib", 0.5, "--json").document
    assert found["gpu"]["bytes"] == 2**29
    assert found["gpu"]["share"] == pytest.approx(found["memory"]["total"] / 2**29)
    flops = found["flops_per_token"]
    assert flops["serving"] == flops["serving_merged"] + flops["beside"]
    assert run("plan", tiny_base, "--json").document["gpu"] == {"bytes": None, "share": None}
    told = run("plan", file, "--gpu-gib", 0.001).out
    assert "it does not fit" in told
    assert "FLOP a token of training" in told


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("Bert", "BertForSequenceClassification"),
        ("DebertaV2", None),
        ("T5", None),
        ("ViT", None),
    ],
)
def test_plan_makes_the_kind_of_model_that_the_config_is_of(
    run: Run, tmp_path: Path, family: str, architecture: str | None
) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        architectures=[architecture] if architecture else None
    )
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    found = run("plan", tmp_path, "--method", "full", "--max-tokens", 8, "--json").document
    assert found["trainable"] == found["total"] > 10**6
    if architecture:
        head = run("plan", tmp_path, "--method", "probe", "--max-tokens", 8, "--json").document
        assert "classifier" in head["modules"]
