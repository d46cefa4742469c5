"""kohya's and diffusers' names for CLIP's text encoder, loaded by diffusers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sidepath.convert.formats import convert, format_of
from sidepath.convert.pipeline_names import matched, spellings
from sidepath.convert.portable import Base
from sidepath.errors import ConfigError, DamagedAdapter, StoreError
from sidepath.store.adapter import load

from .made import made, options, same_adapter, save_base

IDS = torch.tensor([[1, 5, 9, 33, 7, 2, 49]])
# diffusers knows a file of kohya's by the output projections in it, so that each has some.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "alpha": 4, "targets": ("q_proj", "out_proj", "fc1")},
    "other alpha": {"r": 4, "alpha": 10, "targets": ("q_proj", "v_proj", "out_proj")},
    "patterns": {
        "r": 4,
        "alpha": 8,
        "targets": ("q_proj", "k_proj", "out_proj", "fc2"),
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"fc2": 3},
    },
}


def clip() -> Any:
    """A text encoder of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=49,
        pad_token_id=1,
        initializer_factor=5.0,
    )
    return CLIPTextModel(config).eval()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return save_base(clip(), tmp_path_factory.mktemp("bases") / "clip")


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).last_hidden_state
        return found


def in_diffusers(path: Path, prefix: str = "text_encoder") -> torch.Tensor:
    """What the encoder answers once diffusers has put the file on it."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of diffusers' own imports
        from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Loader

        state, alphas, metadata = Loader.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            return_lora_metadata=True,
            local_files_only=True,
        )
        model = clip()
        Loader.load_lora_into_text_encoder(
            state, network_alphas=alphas, text_encoder=model, prefix=prefix, metadata=metadata
        )
    return answer(model)


CASES = [(name, kind) for name in ("kohya", "diffusers") for kind in SETTINGS]
MIXED = ("kohya", "patterns")
"""diffusers 0.42.1 loses these alphas: its pattern says `text_model.`, the model has none."""


@pytest.mark.slow  # to import diffusers
@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case != MIXED])
def test_diffusers_gives_the_same_states(name: str, kind: str, tmp_path: Path) -> None:
    folder, model = made(clip, tmp_path / "ours", **SETTINGS[kind])
    found = convert(folder, tmp_path / "lora.safetensors", name)
    assert found.notes == ()
    expected, plain = answer(model), answer(clip())
    states = in_diffusers(tmp_path / "lora.safetensors")
    effect = (expected - plain).abs().max()
    assert effect > 0.05
    assert (states - expected).abs().max() < 1e-4 * effect


def test_alphas_of_their_own_by_the_written_rule(tmp_path: Path) -> None:
    """W0 + alpha / R up down, each module with its own alpha; a note that diffusers will not."""
    folder, model = made(clip, tmp_path / "ours", **SETTINGS["patterns"])
    found = convert(folder, tmp_path / "lora.safetensors", "kohya")
    assert "--to diffusers" in found.notes[0]
    tensors, slow = load_file(tmp_path / "lora.safetensors"), clip()
    for path, module in slow.named_modules():
        start = f"lora_te_text_model_{path.replace('.', '_')}"
        if f"{start}.alpha" in tensors:
            down, up = tensors[f"{start}.lora_down.weight"], tensors[f"{start}.lora_up.weight"]
            with torch.no_grad():
                module.weight += tensors[f"{start}.alpha"] / len(down) * up @ down
    assert torch.allclose(answer(slow), answer(model), atol=1e-4)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_1", "text_encoder_2"])
@pytest.mark.parametrize("name", ["kohya", "diffusers"])
def test_names_and_the_way_back(name: str, component: str, encoder: Base, tmp_path: Path) -> None:
    folder, _ = made(clip, tmp_path / "ours", **SETTINGS["patterns"])
    path = tmp_path / "lora.safetensors"
    convert(folder, path, name, options=options(component=component))
    key = {
        ("kohya", "text_encoder"): "lora_te_text_model_encoder_layers_1_mlp_fc2.alpha",
        ("kohya", "text_encoder_1"): "lora_te1_text_model_encoder_layers_1_mlp_fc2.alpha",
        ("kohya", "text_encoder_2"): "lora_te2_text_model_encoder_layers_1_mlp_fc2.alpha",
        ("diffusers", "text_encoder_2"): "text_encoder_2.text_model.encoder.layers.1.mlp.fc2"
        ".lora_A.weight",
    }.get((name, component), "text_encoder.text_model.encoder.layers.1.mlp.fc2.lora_A.weight")
    assert key in load_file(path)
    assert format_of(path) == name
    convert(path, tmp_path / "back", "sidepath", options=options(component=component))
    same_adapter(folder, tmp_path / "back")
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(path), plain, metadata=without_ours(path))
    convert(plain, tmp_path / "read", "sidepath", options=options(encoder, component=component))
    model = clip()
    load(model, tmp_path / "read", "read")
    original = clip()
    load(original, folder, "ours")
    assert torch.allclose(answer(model), answer(original), atol=1e-6)


def without_ours(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return {key: value for key, value in file.metadata().items() if key != "sidepath"}


@pytest.mark.parametrize("ending", [".lora.down.weight", ".lora_linear_layer.down.weight"])
def test_older_spellings_of_diffusers(ending: str, encoder: Base, tmp_path: Path) -> None:
    """Without settings: alpha is the rank, or stands in a tensor of its own."""
    start = "text_encoder.text_model.encoder.layers.0.self_attn."
    A, B = torch.randn(2, 16), torch.randn(16, 2)
    tensors = {
        start + "q_proj" + ending: A,
        start + "q_proj" + ending.replace("down", "up"): B,
        start + "k_proj" + ending: A.clone(),
        start + "k_proj" + ending.replace("down", "up"): B.clone(),
        start + "k_proj.alpha": torch.tensor(6.0),
    }
    save_file(tensors, tmp_path / "old.safetensors")
    convert(tmp_path / "old.safetensors", tmp_path / "read", "sidepath", options=options(encoder))
    model, slow = clip(), clip()
    load(model, tmp_path / "read", "read")
    with torch.no_grad():
        attention = slow.get_submodule("encoder.layers.0.self_attn")
        attention.q_proj.weight += B @ A
        attention.k_proj.weight += 3.0 * B @ A
    assert torch.allclose(answer(model), answer(slow), atol=1e-4)


def test_other_components_are_counted_and_an_absent_one_is_named(tmp_path: Path) -> None:
    folder, _ = made(clip, tmp_path / "ours", **SETTINGS["plain"])
    convert(folder, tmp_path / "one.safetensors", "kohya")
    tensors = load_file(tmp_path / "one.safetensors")
    tensors["lora_unet_mid_block.lora_up.weight"] = torch.zeros(2, 2)
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        save_file(tensors, tmp_path / "two.safetensors", metadata=file.metadata())
    found = convert(tmp_path / "two.safetensors", tmp_path / "back", "sidepath")
    assert found.notes == ("1 tensors of other components were left out (lora_unet)",)
    with pytest.raises(StoreError, match="no tensors of this component") as raised:
        convert(
            tmp_path / "two.safetensors",
            tmp_path / "other",
            "sidepath",
            options=options(component="text_encoder_2"),
        )
    assert "lora_te, lora_unet" in str(raised.value)


def test_underscores_need_a_base_and_may_mean_two_modules(tmp_path: Path) -> None:
    folder, _ = made(clip, tmp_path / "ours", **SETTINGS["plain"])
    convert(folder, tmp_path / "one.safetensors", "kohya")
    save_file(load_file(tmp_path / "one.safetensors"), tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match="where the dots"):
        convert(tmp_path / "plain.safetensors", tmp_path / "back", "sidepath")
    table = spellings(["a.b_c", "a_b.c", "d"], "_")
    assert matched(["d"], table, None) == {"d": "d"}
    with pytest.raises(DamagedAdapter) as raised:
        matched(["a_b_c", "d", "e"], table, None)
    assert raised.value.faults == [
        "a_b_c: means a.b_c or a_b.c",
        "e: means no module of the base",
    ]


def test_two_names_of_one_module_are_refused(encoder: Base, tmp_path: Path) -> None:
    """Both of a name's forms, or both of diffusers' spellings: none wins in silence."""
    table = spellings(["encoder.layers.0.q"], "_")
    names = ["encoder_layers_0_q", "text_model_encoder_layers_0_q"]
    with pytest.raises(DamagedAdapter, match=f"{names[1]}: means .*so does {names[0]}"):
        matched(names, table, None)
    folder, _ = made(clip, tmp_path / "ours", **SETTINGS["plain"])
    convert(folder, tmp_path / "one.safetensors", "diffusers")
    tensors = load_file(tmp_path / "one.safetensors")
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora"
    tensors[f"{key}.down.weight"] = torch.zeros(4, 16)
    tensors[f"{key}.up.weight"] = torch.zeros(16, 4)
    save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(DamagedAdapter, match="comes twice"):
        convert(tmp_path / "two.safetensors", tmp_path / "b", "sidepath", options=options(encoder))


@pytest.mark.parametrize("name", ["kohya", "diffusers"])
def test_all_faults_at_once(name: str, encoder: Base, tmp_path: Path) -> None:
    folder, _ = made(clip, tmp_path / "ours", **SETTINGS["patterns"])
    convert(folder, tmp_path / "one.safetensors", name)
    tensors = load_file(tmp_path / "one.safetensors")
    if name == "kohya":
        start = "lora_te_text_model_encoder_layers_0_"
        del tensors[f"{start}self_attn_q_proj.lora_up.weight"]
        tensors[f"{start}self_attn_k_proj.lora_down.weight"] = torch.zeros(3, 16)
        tensors[f"{start}mlp_fc2.alpha"] = torch.tensor(-1.0)
        tensors[f"{start}mlp_fc2.dora_scale"] = torch.zeros(16, 1)
        words: tuple[str, ...] = (
            "lora_up is missing",
            "no two factors",
            "expected a number above 0",
            "dora_scale",
        )
        more = {}
    else:
        start = "text_encoder.text_model.encoder.layers.0."
        del tensors[f"{start}self_attn.q_proj.lora_B.weight"]
        tensors[f"{start}self_attn.k_proj.lora_A.weight"] = torch.zeros(3, 16)
        tensors[f"{start}mlp.fc2.lora_A.weight"] = torch.zeros(3, 32)
        tensors[f"{start}mlp.fc2.lora_B.weight"] = torch.zeros(16, 3)
        tensors[f"{start}mlp.fc2.lora_magnitude_vector"] = torch.zeros(16)
        words = ("A or B is missing", "no two factors", "the settings say 4", "magnitude", "use_x")
        more = without_ours(tmp_path / "one.safetensors")
        said = json.loads(more["lora_adapter_metadata"])
        more["lora_adapter_metadata"] = json.dumps({**said, "text_encoder.use_x": True})
    save_file(tensors, tmp_path / "bad.safetensors", metadata=more)
    with pytest.raises(DamagedAdapter) as raised:
        convert(tmp_path / "bad.safetensors", tmp_path / "b", "sidepath", options=options(encoder))
    for word in words:
        assert word in " ".join(raised.value.faults)
    assert not (tmp_path / "b").exists()
