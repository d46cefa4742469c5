"""The verb inspect: one adapter, two, beside the base, made smaller, and what was enough."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidepath.analyse import against, factors_of
from sidepath.cli import inspecting
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject
from tests.cli.conftest import Run, write_base
from tests.conftest import tiny_gpt2
from tests.faults import Faults
from tests.pages import Collector, fetched


def test_inspect_one_and_two(run: Run, tiny_base: Path, trained: Path) -> None:
    layers = run("inspect", trained, "--json").document["layers"]
    tensors = load_file(trained / "adapter_model.safetensors")
    assert len(layers) == 14
    assert all(layer["relative_norm"] is None for layer in layers)
    based = run("inspect", trained, "--base", tiny_base, "--json").document["layers"]
    weights = load_file(tiny_base / "model.safetensors")
    for layer in based:
        start = f"base_model.model.{layer['name']}.lora_"
        delta = 8.0 * tensors[f"{start}B.weight"] @ tensors[f"{start}A.weight"]
        expected = torch.linalg.svdvals(delta.double())[: layer["r"]].tolist()
        assert layer["singular_values"] == pytest.approx(expected, abs=1e-6)
        relative = delta.norm() / weights[f"{layer['name']}.weight"].norm()
        assert layer["relative_norm"] == pytest.approx(float(relative), rel=1e-4)
    shared = run("inspect", trained, trained, "--json").document["similarity"]
    assert len(shared) == 14
    assert all(layer["phi"][i][i] == pytest.approx(1.0) for layer in shared for i in range(2))


def test_beside_the_base_each_update_is_held_against_its_weight(
    run: Run, tiny_base: Path, trained: Path
) -> None:
    found = run("inspect", trained, "--base", tiny_base, "--json").document["against"]
    weights = load_file(tiny_base / "model.safetensors")
    factors = factors_of(trained)
    assert [row["name"] for row in found] == list(factors)
    for row in found:
        expected = against(weights[f"{row['name']}.weight"], factors[row["name"]]).as_dict()
        assert row == {"name": row["name"], **{k: _listed(v) for k, v in expected.items()}}
    left = run("inspect", trained, "--base", tiny_base, "--widest", 8, "--json")
    assert [row["name"].split(".")[-1] for row in left.document["against"]] == [
        "k_proj",
        "v_proj",
    ] * 2
    assert "10 weights are wider than --widest 8" in left.err


def _listed(value: object) -> object:
    return pytest.approx(value) if isinstance(value, float) else value


def test_transposed_weights_are_turned(run: Run, tmp_path: Path) -> None:
    """GPT-2's c_proj is square and stored with its inputs first: a wrong turn would go unseen."""
    base = tmp_path / "gpt2"
    tiny_gpt2().save_pretrained(base)
    model = tiny_gpt2()
    adapter = inject(model, LoRA(r=2, targets=("attn.c_proj",), layers=(0,)), "made")
    for parameter in adapter.parameters():
        parameter.data.normal_()
    folder = adapter.save(tmp_path / "made")
    ((name, factors),) = factors_of(folder).items()
    (row,) = run("inspect", folder, "--base", base, "--json").document["against"]
    weight = load_file(base / "model.safetensors")[f"{name}.weight"].T
    assert row["projected"] == pytest.approx(against(weight, factors).projected)
    assert row["projected"] != pytest.approx(against(weight.T, factors).projected)


def test_the_report_shows_the_documents_numbers_and_stands_alone(
    run: Run, tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    said = run("inspect", trained, "--base", tiny_base, "--html", path, "--json").document
    text = path.read_text()
    page = Collector(text)
    assert said["html"] == str(path)
    assert fetched(text) == []
    for layer in said["layers"]:
        assert layer["name"] in page.text
        assert f"{layer['norm']:.3g}" in page.text
    for row in said["against"]:
        assert f"{row['amplification']:.3g}" in page.text
    assert "sidepath train" in page.text, "the command that made it"
    pytest.importorskip("matplotlib")
    pictures = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(pictures) == 2
    assert all(attrs["aria-label"] for attrs in pictures)


def test_two_adapters_share_what_they_share(
    run: Run, tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    same = run("inspect", trained, trained)
    assert "hold the same updates" in same.out
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    torch.manual_seed(3)
    part = inject(model, LoRA(r=3, targets=("q_proj", "v_proj")), "part")
    for parameter in part.parameters():
        parameter.data.normal_()
    folder = part.save(tmp_path / "part")
    path = tmp_path / "two.html"
    found = run("inspect", trained, folder, "--html", path, "--json")
    assert {row["name"].split(".")[-1] for row in found.document["similarity"]} == {
        "q_proj",
        "v_proj",
    }
    assert "10 updates have no counterpart" in found.err
    assert found.document["equal"] is False
    for row in found.document["similarity"]:
        assert (len(row["phi"]), len(row["phi"][0])) == (2, 3)
        assert row["expected"] == pytest.approx(3 / 16)
        shapes = {name: (len(phi), len(phi[0])) for name, phi in row["grids"].items()}
        assert shapes == dict.fromkeys(("B", "inputs", "outputs", "random"), (2, 3))
    assert "What counting and part share" in Collector(path.read_text()).text


@pytest.mark.parametrize("keep", ["r=1", "energy=0.5"])
def test_a_smaller_adapter_is_as_far_away_as_is_said(
    run: Run, tiny_base: Path, trained: Path, pairs: Path, tmp_path: Path, keep: str
) -> None:
    small = tmp_path / "small"
    flags = ("--base", tiny_base, "--data", pairs, "--truncate", keep, "--output", small)
    said = run("inspect", trained, *flags, "--json").document["truncated"]
    old, new = factors_of(trained), factors_of(small)
    assert {layer["r"] for layer in said["layers"]} == {1}
    lost, whole = 0.0, 0.0
    for layer in said["layers"]:
        name = layer["name"]
        updates = [
            one.scaling * one.B_Or.double() @ one.A_RI.double() for one in (old[name], new[name])
        ]
        assert float((updates[0] - updates[1]).norm()) == pytest.approx(layer["error"], abs=1e-6)
        lost, whole = lost + layer["error"] ** 2, whole + layer["norm"] ** 2
    assert said["relative_error"] == pytest.approx((lost / whole) ** 0.5)
    for folder, when in ((trained, "before"), (small, "after")):
        words = ("--base", tiny_base, "--adapter", folder, "--data", pairs, "--json")
        measured = run("eval", *words).document["metrics"]["loss"]
        assert said["metrics"]["loss"][when] == pytest.approx(measured, rel=1e-6)
    again = run("inspect", trained, *flags)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert run("inspect", trained, *flags, "--overwrite").code == 0


def test_advice_is_a_smaller_adapter_that_keeps_the_metric(
    run: Run, tiny_base: Path, trained: Path, pairs: Path, tmp_path: Path
) -> None:
    small = tmp_path / "enough"
    words = ("--base", tiny_base, "--data", pairs, "--advise", "--tolerance", 0.2)
    ran = run("inspect", trained, *words, "--output", small, "--json")
    advice = ran.document["advice"]
    assert advice["metric"] == "loss"
    assert advice["value"] <= advice["worst_allowed"] == pytest.approx(advice["full"] + 0.2)
    measured = run("eval", "--base", tiny_base, "--adapter", small, "--data", pairs, "--json")
    assert advice["value"] == pytest.approx(measured.document["metrics"]["loss"], rel=1e-6)
    assert {name.split(".")[-1] for name in factors_of(small)} == set(advice["targets"])
    assert all(one.r <= advice["rank"] for one in factors_of(small).values())
    strict = run("inspect", trained, *words[:-1], 0.0, "--json").document["advice"]
    assert strict["value"] <= strict["full"] * (1 + 1e-9)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_of_peft_is_looked_at_and_made_smaller(
    run: Run, tiny_base: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    theirs = get_peft_model(model, settings)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    folder, small = tmp_path / "theirs", tmp_path / "small"
    theirs.save_pretrained(folder)
    layers = run("inspect", folder, "--json").document["layers"]
    assert {layer["r"] for layer in layers} == {4}
    run("inspect", folder, "--truncate", "r=2", "--output", small)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_base)
    again = PeftModel.from_pretrained(fresh, small)
    deltas = {
        name: module.get_delta_weight("default")
        for name, module in again.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    assert len(deltas) == len(layers)
    for name, factors in factors_of(small).items():
        wanted = factors.scaling * factors.B_Or @ factors.A_RI
        torch.testing.assert_close(deltas[f"base_model.model.{name}"], wanted, atol=1e-6, rtol=1e-5)


def test_a_file_of_loralib_is_looked_at_as_it_is(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        "h.0.attn.c_attn.lora_A": torch.randn(4, 6),  # two enabled parts of rank 2
        "h.0.attn.c_attn.lora_B": torch.randn(10, 2),
        "h.0.mlp.lora_A": torch.randn(3, 6),
        "h.0.mlp.lora_B": torch.randn(5, 3),
    }
    path = tmp_path / "loralib.safetensors"
    save_file(state, path)
    unknown = run("inspect", path)
    assert unknown.code == 2
    assert "--alpha" in unknown.err
    layers = run("inspect", path, "--alpha", 6, "--json").document["layers"]
    assert [(layer["name"], layer["r"]) for layer in layers] == [
        ("h.0.attn.c_attn", 2),
        ("h.0.mlp", 3),
    ]
    A, B = (state[f"h.0.mlp.lora_{one}"].double() for one in "AB")
    expected = torch.linalg.svdvals(6 / 3 * B @ A)[:3].tolist()
    assert layers[1]["singular_values"] == pytest.approx(expected)
    A, B = (state[f"h.0.attn.c_attn.lora_{one}"].double() for one in "AB")
    whole = torch.cat([B[:5] @ A[:2], B[5:] @ A[2:]]) * 6 / 2
    assert layers[0]["singular_values"] == pytest.approx(torch.linalg.svdvals(whole)[:4].tolist())


def test_settings_that_do_not_go_together_are_named_at_once(
    run: Run, trained: Path, tiny_base: Path
) -> None:
    ran = run("inspect", trained, trained, "--base", tiny_base, "--advise", "--truncate", "r=2")
    assert ran.code == 2
    for said in ("--base goes with one adapter", "go with one adapter", "needs --data", "--output"):
        assert said in ran.err
    wrong = run("inspect", trained, "--truncate", "energy=2", "--output", "x")
    assert wrong.code == 2
    assert "r=N" in wrong.err
    assert not Path("x").exists()


def test_adapters_that_cannot_be_compared_or_trusted(
    run: Run, trained: Path, adapter: Path, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "third", seed=2)
    other = run("inspect", trained, "--base", base)
    assert other.code == 2
    assert "another base" in other.err
    plain = Path(shutil.copytree(adapter, tmp_path / "plain"))
    (plain / "sidepath.json").unlink()
    tensors = load_file(plain / "adapter_model.safetensors")
    named = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, named: tensors[named] * torch.nan}, plain / "adapter_model.safetensors")
    spoilt = run("inspect", plain)
    assert spoilt.code == 2
    assert named in spoilt.err
    empty = {key: t[:0] if "lora_A" in key else t[:, :0] for key, t in tensors.items()}
    save_file(empty, plain / "adapter_model.safetensors")
    hollow = run("inspect", plain)
    assert hollow.code == 2
    assert "rank 0" in hollow.err
    elsewhere = {key.replace("layers", "blocks"): tensor for key, tensor in tensors.items()}
    save_file(elsewhere, plain / "adapter_model.safetensors")
    apart = run("inspect", trained, plain)
    assert apart.code == 2
    assert "no layer in common" in apart.err


def test_updates_of_other_sizes_than_the_base(run: Run, tiny_base: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    shapes = {"A": (2, 5), "B": (5, 2)}
    tensors = {
        f"base_model.model.{name}.lora_{one}.weight": torch.ones(shape)
        for one, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    ran = run("inspect", tmp_path, "--base", tiny_base)
    assert ran.code == 2, ran.err
    assert f"{name}: the update is [5, 5], the weight" in ran.err


def test_the_page_is_written_whole_or_not_at_all(
    run: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspecting, "report", lambda *_: "new" * 1000)
    page = tmp_path / "page.html"
    for number in itertools.count(1):
        page.write_text("old")
        with Faults(number, under=tmp_path) as faults:
            ran = run("inspect", trained, "--html", page)
        assert page.read_text() == ("old" if ran.code else "new" * 1000)
        if not faults.hit:
            break
    assert ran.code == 0
    assert number > 5
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
