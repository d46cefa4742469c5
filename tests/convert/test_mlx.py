"""mlx-lm's adapters, loaded by mlx-lm where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sidepath.convert.formats import convert
from sidepath.convert.portable import Base
from sidepath.errors import DamagedAdapter, StoreError
from sidepath.store.adapter import load
from tests.conftest import tiny_llama

from .conftest import biased_llama
from .made import ATTENTION, KINDS, SPECIAL, made, options, save_base

IDS = [[1, 5, 9, 33, 7, 2, 60, 11]]


def in_mlx(model: nn.Module) -> Any:
    """The same Llama in mlx-lm, with the same weights."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    models = pytest.importorskip("mlx_lm.models.llama", reason="mlx-lm is not installed")
    config: Any = model.config
    names = (
        "model_type hidden_size num_hidden_layers intermediate_size num_attention_heads"
        " rms_norm_eps vocab_size num_key_value_heads attention_bias max_position_embeddings"
        " tie_word_embeddings"
    )
    args = models.ModelArgs.from_dict(
        {name: getattr(config, name) for name in names.split()}
        | {"rope_theta": config.rope_parameters["rope_theta"]}
    )
    theirs = models.Model(args)
    theirs.load_weights([(key, mx.array(t.numpy())) for key, t in model.state_dict().items()])
    return theirs


def logits_of(theirs: Any) -> torch.Tensor:
    import mlx.core as mx

    theirs.eval()
    return torch.tensor(theirs(mx.array(IDS)).tolist())


@pytest.mark.parametrize(
    "settings",
    [
        *(KINDS[kind] for kind in ("plain", "one layer", "rank pattern", "alpha pattern")),
        KINDS["rank-stabilised"],
        *(SPECIAL[kind] for kind in ("DoRA", "embedding and head")),
    ],
)
@pytest.mark.parametrize("with_base", [True, False])
def test_logits_in_mlx(
    settings: dict[str, Any], with_base: bool, llama: Base, tmp_path: Path
) -> None:
    theirs = in_mlx(biased_llama())
    from mlx_lm.tuner.utils import load_adapters

    embeds = "embed_tokens" in settings["targets"]
    folder, model = made(biased_llama, tmp_path / "ours", **settings)
    base = llama if with_base or embeds else None
    convert(folder, tmp_path / "mlx", "mlx", options=options(base))
    with torch.no_grad():
        plain, expected = biased_llama()(torch.tensor(IDS)).logits, model(torch.tensor(IDS)).logits
    assert torch.allclose(logits_of(theirs), plain, atol=1e-4)
    found = logits_of(load_adapters(theirs, str(tmp_path / "mlx")))
    effect = (expected - plain).abs().max()
    assert effect > 0.05
    assert (found - expected).abs().max() < 1e-3 * effect


def test_the_keys_are_those_that_mlx_writes(llama: Base, tmp_path: Path) -> None:
    """Adapters of the last blocks are named within them, as mlx-lm does; others by their paths."""
    folder, _ = made(biased_llama, tmp_path / "ours", r=2, targets=("q_proj",), layers=(1,))
    convert(folder, tmp_path / "last", "mlx", options=options(llama))
    last = json.loads((tmp_path / "last" / "adapter_config.json").read_text())
    assert last["num_layers"] == 1
    assert last["lora_parameters"]["keys"] == ["self_attn.q_proj"]
    folder, _ = made(biased_llama, tmp_path / "first", r=2, targets=("q_proj",), layers=(0,))
    convert(folder, tmp_path / "paths", "mlx", options=options(llama))
    first = json.loads((tmp_path / "paths" / "adapter_config.json").read_text())
    assert first["lora_parameters"]["keys"] == ["model.layers.0.self_attn.q_proj"]


def test_from_mlx_itself(llama: Base, tmp_path: Path) -> None:
    """An adapter that mlx-lm made, on the base in torch."""
    theirs = in_mlx(biased_llama())
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {
        "rank": 3,
        "scale": 2.5,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj", "mlp.up_proj"],
    }
    theirs.freeze()
    linear_to_lora_layers(theirs, 2, parameters)
    mx.random.seed(3)
    theirs.apply_to_modules(
        lambda _, one: (
            setattr(one, "lora_b", mx.random.normal(one.lora_b.shape)) if "lora_b" in one else None
        )
    )
    place = tmp_path / "mlx"
    place.mkdir()
    trained = dict(tree_flatten(theirs.trainable_parameters()))
    mx.save_safetensors(str(place / "adapters.safetensors"), trained)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "seed": 0}
    (place / "adapter_config.json").write_text(json.dumps(config))
    convert(place, tmp_path / "ours", "sidepath", options=options(llama))
    model = biased_llama()
    load(model, tmp_path / "ours", "theirs")
    with torch.no_grad():
        found = model(torch.tensor(IDS)).logits
    assert torch.allclose(found, logits_of(theirs), atol=1e-3)


def test_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    base = save_base(tiny_llama(tied=True), tmp_path / "base")
    folder, _ = made(lambda: tiny_llama(tied=True), tmp_path / "ours", targets=("embed_tokens",))
    with pytest.raises(StoreError, match="tied embedding"):
        convert(folder, tmp_path / "mlx", "mlx", options=options(base))
    with pytest.raises(StoreError, match="not known"):
        convert(folder, tmp_path / "mlx", "mlx")
    assert not (tmp_path / "mlx").exists()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({"fine_tune_type": "full"}, "fine_tune_type 'full'"),
    "no parameters": ({"lora_parameters": 3}, "lora_parameters is no table"),
    "no scale": ({"lora_parameters": {"rank": 2}}, "scale: None"),
    "a scale of nothing": ({"lora_parameters": {"rank": 2, "scale": 0}}, "above 0"),
    "a scale beyond floats": ({"lora_parameters": {"rank": 2, "scale": 10**400}}, "at most"),
    "an endless scale": ({"lora_parameters": {"rank": 2, "scale": 1e308}}, "at most"),
    "another rank": ({"lora_parameters": {"rank": 3, "scale": 1.0}}, "expected rank 3"),
    "a rank of text": ({"lora_parameters": {"rank": "2", "scale": 1.0}}, "whole number"),
    "DoRA without m": ({"fine_tune_type": "dora"}, "m is missing"),
    "another record": ({"sidepath": {"tensors": 3}}, "malformed"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_settings(kind: str, tmp_path: Path) -> None:
    folder, _ = made(biased_llama, tmp_path / "ours", r=2, targets=("q_proj",))
    convert(folder, tmp_path / "mlx", "mlx")
    path = tmp_path / "mlx" / "adapter_config.json"
    changed, said = BAD[kind]
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(DamagedAdapter, match=said):
        convert(tmp_path / "mlx", tmp_path / "back", "sidepath")
    assert not (tmp_path / "back").exists()


def test_all_faults_of_the_settings_at_once(tmp_path: Path) -> None:
    folder, _ = made(biased_llama, tmp_path / "ours", r=2, targets=("q_proj",))
    convert(folder, tmp_path / "mlx", "mlx")
    path = tmp_path / "mlx" / "adapter_config.json"
    bad = {"fine_tune_type": "full", "lora_parameters": {"rank": 0, "scale": -1, "dropout": 1}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **bad}))
    with pytest.raises(DamagedAdapter) as raised:
        convert(tmp_path / "mlx", tmp_path / "back", "sidepath")
    for word, fault in zip(("full", "scale", "dropout", "rank"), raised.value.faults, strict=True):
        assert word in fault


def test_all_faults_of_the_tensors_at_once(tmp_path: Path) -> None:
    folder, _ = made(biased_llama, tmp_path / "ours", r=2, targets=ATTENTION)
    convert(folder, tmp_path / "mlx", "mlx")
    path = tmp_path / "mlx" / "adapters.safetensors"
    tensors = load_file(path)
    start = "model.layers.0.self_attn."
    del tensors[f"{start}q_proj.lora_a"]
    tensors[f"{start}k_proj.lora_a"] = torch.zeros(4, 2, 3)
    tensors[f"{start}v_proj.lora_b"] = torch.zeros(5, 16)
    tensors["stray"] = torch.zeros(2)
    save_file(tensors, path)
    with pytest.raises(DamagedAdapter) as raised:
        convert(tmp_path / "mlx", tmp_path / "back", "sidepath")
    said = " ".join(raised.value.faults)
    for word in ("q_proj: lora_a or lora_b is missing", "experts", "expected rank 2", "stray"):
        assert word in said
