"""One base packed and unpacked is one base; another one is not. Adapters go either way."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import sidepath
from sidepath import LoRA
from sidepath.errors import SidepathNotice, StoreError, WrongBase
from sidepath.injection.merging import merge
from sidepath.injection.quantising import quantise_
from sidepath.store.adapter import inject, load
from sidepath.store.fingerprint import Fingerprint, fingerprint, same_base
from sidepath.store.plan import plan
from tests.conftest import outputs, randomise, tiny_bert, tiny_gpt2, tiny_llama
from tests.store.quantised import packed, plain, stored

IDS = torch.tensor([[5, 9, 3, 17, 22], [1, 2, 3, 4, 5]])
MAKES = [tiny_llama, tiny_gpt2, tiny_bert]


def moved(model: Any, size: float) -> Any:
    """The model with each weight moved a little, as a fine-tune would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + size * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", MAKES)
def test_packed_and_plain_are_one_base(make: Any, dtype: torch.dtype, double: bool) -> None:
    model = make().to(dtype)
    quantise_(model, double=double)
    found, original = fingerprint(model), fingerprint(make())
    names = {sample.dtype for sample in found.samples.values() if sample.packed}
    short = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert names == {f"NF4-{short}-64-{256 if double else 0}"}
    assert same_base(found, original) == []
    assert same_base(original, found) == []
    assert Fingerprint.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    other = make()
    quantise_(other, double=not double)
    assert same_base(found, fingerprint(other)) == [], "packed in another way"


@pytest.mark.parametrize("make", MAKES)
def test_another_base_is_another_in_any_form(make: Any) -> None:
    own, other = make(), moved(make(), 0.5)
    prints = [fingerprint(own), fingerprint(other)]
    quantise_(own)
    quantise_(other)
    forms = [(prints[0], fingerprint(own)), (prints[1], fingerprint(other))]
    weights = [name for name, sample in forms[0][1].samples.items() if sample.packed]
    for one in forms[0]:
        for two in forms[1]:
            faults = [fault.partition(":")[0] for fault in same_base(one, two)]
            assert set(weights) <= set(faults), "each packed weight alone tells them apart"


def test_a_slight_fine_tune_is_seen_over_the_whole_base() -> None:
    """2 % of each weight: one sample in ten crosses to another code; no model has few of them."""
    own, tuned = tiny_llama(), moved(tiny_llama(), 0.02)
    prints = fingerprint(tuned)
    quantise_(own)
    quantise_(tuned)
    packed_names = [n for n, sample in fingerprint(own).samples.items() if sample.packed]
    for other in (prints, fingerprint(tuned)):
        faults = [fault.partition(":")[0] for fault in same_base(fingerprint(own), other)]
        assert len(set(faults) & set(packed_names)) >= len(packed_names) // 4


def test_a_neighbouring_code_is_another_number() -> None:
    """Of one packing: the two intervals touch, but neither number lies in the other's."""
    own, other = tiny_llama(), tiny_llama()
    quantise_(own)
    quantise_(other)
    weight = other.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr, index]
    low = weight.data & 15
    weight.data = (weight.data & 240) | torch.where(low < 15, low + 1, low - 1).to(torch.uint8)
    (fault,) = same_base(fingerprint(own), fingerprint(other))
    assert fault.startswith("model.layers.0.mlp.up_proj.weight: other values")


def test_merging_does_not_change_it() -> None:
    model = tiny_llama()
    quantise_(model)
    before = fingerprint(model)
    randomise(sidepath.inject(model, LoRA(r=2), "a").parameters())
    merge(model, "a")
    assert fingerprint(model) == before


@pytest.mark.parametrize("sharded", [False, True])
def test_a_packed_folder_is_the_model_it_holds(
    tmp_path: Path, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = stored(tiny_llama(), tmp_path / "plain")
    model = packed(base)
    model.save_pretrained(tmp_path / "packed", max_shard_size="6KB" if sharded else "1GB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2 * sharded
    read = []
    pread = os.pread

    def counted(file: int, length: int, offset: int) -> bytes:
        read.append(length)
        return pread(file, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    assert fingerprint(tmp_path / "packed") == fingerprint(model)
    assert sum(read) < 3000 * len(fingerprint(model).samples), "16 numbers a tensor, and tables"
    assert same_base(fingerprint(base), fingerprint(tmp_path / "packed")) == []
    again = plain(tmp_path / "packed")
    assert fingerprint(again) == fingerprint(model)
    assert torch.equal(outputs(again, IDS), outputs(model, IDS))


@pytest.mark.parametrize("fault", ["json", "shape", "block", "dtype", "kind", "missing", "short"])
def test_a_malformed_packed_folder_is_refused(tmp_path: Path, fault: str) -> None:
    base = stored(tiny_llama(), tmp_path / "plain")
    folder = stored(packed(base), tmp_path / "packed")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    weight = "model.layers.0.mlp.up_proj.weight"
    record = f"{weight}.quant_state.bitsandbytes__nf4"
    start, stop = header[record]["data_offsets"]
    values = json.loads(bytes(body[start:stop]))
    if fault == "missing":
        header[f"{weight}.other"] = header.pop(f"{weight}.absmax")
    elif fault == "short":
        header[f"{weight}.quant_map"]["shape"] = [8]
        begin = header[f"{weight}.quant_map"]["data_offsets"][0]
        header[f"{weight}.quant_map"]["data_offsets"] = [begin, begin + 32]
    else:
        change = {
            "json": "[]", "shape": json.dumps(values | {"shape": [64, 3]}),
            "block": json.dumps(values | {"blocksize": 0}),
            "dtype": json.dumps(values | {"dtype": "int4"}),
            "kind": json.dumps(values | {"quant_type": "../x"}),
        }[fault]  # fmt: skip
        body[start:stop] = change.encode().ljust(stop - start)[: stop - start]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    with pytest.raises(StoreError, match="malformed"):
        fingerprint(folder)


def test_a_plan_over_it_changes_nothing() -> None:
    """The plan's twin has no memory: the packed weights and their scales stay where they are."""
    model = tiny_llama()
    quantise_(model)
    before, base = fingerprint(model), outputs(model, IDS)
    found = plan(model, LoRA(r=2))
    assert len(found.sites) == 14
    assert found.trainable == sum(
        p.numel() for p in inject(tiny_llama(), LoRA(r=2), "x").parameters()
    )
    assert fingerprint(model) == before
    assert torch.equal(outputs(model, IDS), base)


# -- adapters over it ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_an_adapter_goes_either_way_and_over_no_other_base(tmp_path: Path, make: Any) -> None:
    base = stored(make(), tmp_path / "base")
    other = stored(moved(make(), 0.3), tmp_path / "other")
    for train in (packed, plain):
        folder = tmp_path / train.__name__
        adapter = inject(train(base), LoRA(r=2), "x")
        randomise(adapter.parameters())
        adapter.save(folder)
        for over in (packed, plain):
            model = over(base)
            loaded = load(model, folder, "x")
            assert torch.equal(outputs(model, IDS), outputs(train(base), IDS)) is False
            for path, delta in adapter.deltas.items():
                for name, tensor in delta.tensors().items():
                    assert torch.equal(loaded.deltas[path].tensors()[name], tensor)
            with pytest.raises(WrongBase):
                load(over(other), folder, "x")
        again = train(base)
        load(again, folder, "x")
        assert torch.equal(outputs(again, IDS), outputs(adapter.model, IDS))


def wide_llama() -> Any:
    """A Llama whose rows are multiples of 64 wide: PEFT's layers run bitsandbytes' own product."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_reads_it_over_the_same_packed_base(tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.tuners.lora.bnb import Linear4bit

    base = stored(wide_llama(), tmp_path / "base")
    adapter = inject(packed(base, "float32"), LoRA(r=4), "x")
    randomise(adapter.parameters())
    adapter.save(tmp_path / "a")
    peer = PeftModel.from_pretrained(packed(base, "float32"), str(tmp_path / "a")).eval()
    layer = peer.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, Linear4bit)
    torch.testing.assert_close(
        outputs(peer, IDS), outputs(adapter.model, IDS), atol=1e-5, rtol=1e-5
    )
    peer.save_pretrained(str(tmp_path / "b"))
    model = packed(base, "float32")
    with pytest.warns(SidepathNotice, match="could not be verified"):
        load(model, tmp_path / "b", "x")
    torch.testing.assert_close(
        outputs(model, IDS), outputs(adapter.model, IDS), atol=1e-6, rtol=1e-6
    )
