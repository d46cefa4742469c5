"""The verbs combine and extract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.faults import flip_bit


@pytest.fixture
def second(run: Run, tiny_base: Path, pairs: Path, tmp_path: Path) -> Path:
    """Another adapter of the tiny base."""
    output = tmp_path / "second"
    flags = "--r 3 --steps 2 --batch-size 4 --learning-rate 0.05 --scaling alpha/sqrt(r) --seed 5"
    command = ["train", "--base", tiny_base, "--data", pairs, "--output", output]
    ran = run(*command, *flags.split(), "--no-forgetting")
    assert ran.code == 0, ran.err
    return output


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    """Each `s B A` of a folder, by PEFT's settings."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, A in tensors.items():
        if key.endswith("lora_A.weight"):
            r = A.shape[0]
            scaling = settings["lora_alpha"] / (r**0.5 if settings["use_rslora"] else r)
            assert not settings["rank_pattern"]
            found[key] = scaling * tensors[key.replace("lora_A", "lora_B")].double() @ A.double()
    return found


def test_combine_and_generate(
    run: Run, tiny_base: Path, trained: Path, second: Path, tmp_path: Path
) -> None:
    out = tmp_path / "both"
    ran = run("combine", trained, second, out, "--weights", "-1,0.5", "--json")
    assert ran.code == 0, ran.err
    document = ran.document
    assert document["output"] == str(out)
    assert (document["kind"], document["error"]) == ("concatenate", 0.0)
    assert [layer["r"] for layer in document["layers"]] == [5] * 14
    assert [one["weight"] for one in document["adapters"]] == [-1.0, 0.5]
    one, other = matrices(trained), matrices(second)
    for key, update in matrices(out).items():
        torch.testing.assert_close(update, -one[key] + 0.5 * other[key], atol=1e-6, rtol=1e-5)
    record = json.loads((out / "sidepath.json").read_text())["record"]
    assert "--weights -1,0.5" in record["command"]
    assert run("generate", "--base", tiny_base, "--adapter", out, "--prompt", "a").code == 0
    assert run("inspect", out, "--base", tiny_base).code == 0
    again = run("combine", trained, second, out)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert run("combine", trained, second, out, "--overwrite").code == 0


def test_kinds_and_settings_file(run: Run, trained: Path, second: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        '[combine]\nkind = "ties"\nr = 2\ndensity = 0.5\nweights = [1, 1]\n'
        'layer_weights = { "*.mlp.*" = [0.5, 0.25] }\n'
    )
    ran = run("combine", trained, second, tmp_path / "ties", "--config", path)
    assert ran.code == 0, ran.err
    assert "ties of 1 x counting, 1 x second" in ran.out
    assert "error over all layers: " in ran.out
    flagged = run(
        *("combine", trained, second, tmp_path / "again", "--kind", "ties", "--r", 2, "--json"),
        *("--density", 0.5, "--layer-weights", "*.mlp.*=0.5,0.25"),
    )
    assert flagged.code == 0, flagged.err
    a, b = matrices(tmp_path / "ties"), matrices(tmp_path / "again")
    assert all(torch.equal(a[key], b[key]) for key in a)
    svd = run("combine", trained, second, tmp_path / "svd", "--kind", "svd", "--energy", 0.9)
    assert svd.code == 0, svd.err


def test_combine_refuses_with_one_message(
    run: Run, trained: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for words, said in (
        ((trained, adapter, out, "--kind", "tise"), 'did you mean "ties"'),
        ((trained, adapter, out, "--weights", "1"), "1 weights for 2 adapters"),
        ((trained, adapter, out, "--weights", "1,nan"), "weights"),
        ((trained, adapter, out, "--kind", "dare", "--r", 2, "--density", 2), "density = 2.0"),
        ((trained, adapter, out, "--kind", "svd"), "svd needs a rank"),
        ((trained, adapter, out, "--layer-weights", "q_projj=1,1"), "matches none of 14 layers"),
        ((trained, adapter, adapter, "--overwrite"), "one of the folders that are read"),
        ((trained, tmp_path / "nowhere", out), "no adapter folder"),
        ((trained,), "combine takes ADAPTER... OUT"),
    ):
        ran = run("combine", *words)
        assert (ran.code, ran.out) == (2, ""), ran.err
        assert said in ran.err
        assert "Traceback" not in ran.err
        assert not out.exists()
    flip_bit(adapter / "adapter_model.safetensors")
    ran = run("combine", trained, adapter, out)
    assert ran.code == 2
    assert "its bytes are not those that were saved" in ran.err


def test_extract_what_merge_put_in(
    run: Run, tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    assert run("merge", tiny_base, trained, merged).code == 0
    ran = run("extract", tiny_base, merged, tmp_path / "out", "--r", 2, "--json")
    assert ran.code == 0, ran.err
    document = ran.document
    assert document["relative_error"] < 1e-4
    assert all(layer["relative_error"] < 1e-4 for layer in document["layers"])
    assert document["others"] == []
    wanted, found = matrices(trained), matrices(tmp_path / "out")
    for key, update in found.items():
        assert float((update - wanted[key]).norm()) < 1e-4 * float(wanted[key].norm())
    prompt = ("--base", tiny_base, "--prompt", "count 3:", "--max-new-tokens", 8, "--json")
    texts = [
        run("generate", *prompt, "--adapter", folder).document["outputs"][0]["text"]
        for folder in (trained, tmp_path / "out")
    ]
    assert texts[0] == texts[1]


def test_extract_says_what_it_left_out(run: Run, tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    tuned = Path(shutil.copytree(tiny_base, tmp_path / "tuned"))
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.norm.weight"] += 1
    tensors["model.layers.0.self_attn.q_proj.weight"][0] += 1
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    ran = run("extract", tiny_base, tuned, tmp_path / "out", "--energy", 0.99)
    assert ran.code == 0, ran.err
    assert "model.norm.weight" in ran.out
    assert "1 of them are not in the adapter; --whole" in ran.out
    assert "13 targets are equal in both" in ran.out
    whole = run("extract", tiny_base, tuned, tmp_path / "all", "--r", 1, "--whole")
    assert "saved whole" in whole.out
    none = run("extract", tiny_base, tuned, tmp_path / "none")
    assert none.code == 2
    assert "extracting needs a rank" in none.err
