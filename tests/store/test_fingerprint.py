"""The same base in any dtype is the same; another one of the same shapes is not."""

from __future__ import annotations

import copy
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from sidepath.errors import DamagedAdapter, StoreError
from sidepath.injection.merging import merge
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject
from sidepath.store.fingerprint import (
    Fingerprint,
    Sample,
    checkpoint_files,
    fingerprint,
    same_base,
)
from sidepath.store.sampling import positions
from tests.conftest import randomise, tiny_bert, tiny_gpt2, tiny_llama

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_one_base_in_every_dtype_is_one_base(make: Any) -> None:
    model = make()
    found = {dtype: fingerprint(copy.deepcopy(model).to(dtype)) for dtype in DTYPES}
    for one, other in itertools.product(DTYPES, DTYPES):
        assert same_base(found[one], found[other]) == []
    assert len({print_.id for print_ in found.values()}) == len(DTYPES)


def test_a_bfloat16_checkpoint_read_as_float16_is_the_same() -> None:
    stored = tiny_llama().bfloat16()
    assert same_base(fingerprint(stored), fingerprint(copy.deepcopy(stored).half())) == []


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_another_fine_tune_of_the_same_shapes_is_refused(dtype: torch.dtype) -> None:
    model, tuned = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    faults = same_base(fingerprint(model), fingerprint(tuned.to(dtype)))
    assert len(faults) == len(list(model.parameters()))
    assert "other values" in faults[0]


def test_a_smallest_change_in_one_dtype_is_seen() -> None:
    model, tuned = tiny_llama(), tiny_llama()
    weight = tuned.get_parameter("lm_head.weight")
    with torch.no_grad():
        weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    expected = ["lm_head.weight: other values (16 of 16 samples)"]
    assert same_base(fingerprint(model), fingerprint(tuned)) == expected


def test_adapters_and_merges_do_not_change_it() -> None:
    model = tiny_llama()
    before = fingerprint(model)
    adapter = inject(model, LoRA(r=2, train_whole=("lm_head",)), "a")
    randomise(adapter.parameters())
    assert fingerprint(model) == before
    merge(model, "a")
    assert fingerprint(model) == before


def test_left_out_modules_are_not_looked_at() -> None:
    found = fingerprint(tiny_bert(), leave_out=("classifier",))
    assert not any(name.startswith("classifier.") for name in found.samples)
    assert same_base(found, fingerprint(tiny_bert())) == []


def test_missing_tensors_and_other_shapes_are_faults() -> None:
    faults = same_base(
        fingerprint(tiny_llama(vocab=64)), fingerprint(tiny_llama(vocab=65, layers=1))
    )
    assert "model.embed_tokens.weight: shape [65, 32], expected [64, 32]" in faults
    assert "model.layers.1.mlp.up_proj.weight: missing" in faults


def test_a_model_without_its_head_has_shorter_names() -> None:
    from transformers import AutoModel

    whole = tiny_bert()
    body = AutoModel.from_config(whole.config)
    body.load_state_dict(whole.bert.state_dict())  # type: ignore[union-attr, arg-type]
    without_head = fingerprint(whole, leave_out=("classifier",))
    assert same_base(without_head, fingerprint(body)) == []
    assert same_base(fingerprint(body), fingerprint(whole)) == []


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_folder_is_the_model_it_holds(tmp_path: Path, make: Any, sharded: bool) -> None:
    model = make()
    model.bfloat16().save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert len(checkpoint_files(tmp_path)) > 1 if sharded else True
    assert same_base(fingerprint(model), fingerprint(tmp_path)) == []
    assert same_base(fingerprint(model.float()), fingerprint(tmp_path)) == []
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.5)
    assert same_base(fingerprint(other), fingerprint(tmp_path))


def test_a_large_folder_is_hardly_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """13.5 GB of bfloat16 in a sparse file: 16 values a tensor, whatever its size."""
    header: dict[str, Any] = {}
    at = 0
    for number in range(290):
        size = 4096 * 5683 * 2
        header[f"model.layers.{number}.weight"] = {
            "dtype": "BF16", "shape": [4096, 5683], "data_offsets": [at, at + size],
        }  # fmt: skip
        at += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    reads = []
    pread = os.pread

    def counted(handle: int, size: int, at: int) -> bytes:
        reads.append(size)
        return pread(handle, size, at)

    monkeypatch.setattr(os, "pread", counted)
    found = fingerprint(tmp_path)
    assert at > 13.4e9
    assert len(found.samples) == 290
    assert sum(reads) == 290 * 16 * 2


@pytest.mark.parametrize("elements", [0, 1, 7, 15, 16, 17, 1000, 4096 * 4096])
def test_positions_are_distinct_and_inside(elements: int) -> None:
    found = positions(elements)
    assert len(set(found)) == len(found) == min(16, elements)
    assert found == sorted(found)
    assert all(0 <= at < elements for at in found)


def test_positions_are_spread_over_rows_and_columns() -> None:
    found = positions(4096 * 4096)
    assert len({at // 4096 for at in found}) == 16
    assert len({at % 4096 for at in found}) == 16


def sample(value: torch.Tensor) -> Fingerprint:
    raw = value.reshape(1).view(torch.uint8).numpy().tobytes()
    return Fingerprint({"w": Sample(NAMES[value.dtype], (1,), raw)})


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.floats(allow_nan=False),
        st.floats(-70000, 70000),
        st.floats(-1e-4, 1e-4),
        st.floats(-1e-38, 1e-38),
    ),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
)
def test_one_number_in_two_dtypes_is_the_same(
    value: float, one: torch.dtype, other: torch.dtype
) -> None:
    exact = torch.tensor(value, dtype=torch.float64)
    if torch.isinf(exact.float()) or torch.isinf(exact.bfloat16()):
        return  # beyond float32 only float16 has an infinity that a checkpoint may hold
    assert same_base(sample(exact.to(one)), sample(exact.to(other))) == []


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-3, 1e3), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans())
def test_numbers_a_step_apart_in_the_coarser_dtype_differ(
    value: float, one: torch.dtype, other: torch.dtype, sign: bool
) -> None:
    step = 2.5 * max(torch.finfo(one).eps, torch.finfo(other).eps)
    first = torch.tensor(-value if sign else value, dtype=torch.float64)
    second = first * (1 + step)
    assert same_base(sample(first.to(one)), sample(second.to(other)))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (float("nan"), float("nan"), True),
        (float("nan"), 0.0, False),
        (float("inf"), 7e4, True),
        (float("inf"), -7e4, False),
        (float("inf"), 6e4, False),
        (0.0, 2.0**-26, True),
        (0.0, 2.0**-23, False),
    ],
)
def test_corners_of_float16(one: float, other: float, same: bool) -> None:
    half, full = torch.tensor(one, dtype=torch.float16), torch.tensor(other)
    assert (same_base(sample(half), sample(full)) == []) is same
    assert (same_base(sample(full), sample(half)) == []) is same


def test_plain_values_and_back() -> None:
    found = fingerprint(tiny_llama())
    assert Fingerprint.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    assert found.id.startswith("sha256:")
    assert len(found.id) == len("sha256:") + 16


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 8},
        {"tensors": 3},
        {"tensors": {"w": 3}},
        {"tensors": {"w": ["F32", [4], "not base64!"]}},
        {"tensors": {"w": ["I64", [4], ""]}},
        {"tensors": {"w": ["F32", [4], "AAAA"]}},
        {"tensors": {"w": ["F32", ["x"], "AAAA"]}},
    ],
)
def test_a_malformed_record_is_refused(change: dict[str, Any]) -> None:
    values = fingerprint(tiny_llama()).as_dict() | change
    with pytest.raises(DamagedAdapter, match="malformed"):
        Fingerprint.from_dict(values)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no safetensors checkpoint"):
        fingerprint(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(StoreError, match=r"(?s)pytorch_model.bin.*never loaded"):
        fingerprint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("[]", "{}", '{"weight_map": {"w": 3}}', "no"):
        index.write_text(text)
        with pytest.raises(StoreError, match="malformed"):
            fingerprint(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path.parent / "outside.safetensors")
    index.write_text('{"weight_map": {"w": "../outside.safetensors"}}')
    with pytest.raises(DamagedAdapter, match="leads out of its folder"):
        fingerprint(tmp_path)


def test_old_names_of_norms_are_known(tmp_path: Path) -> None:
    layer = nn.ModuleDict({"LayerNorm": nn.LayerNorm(8)})
    save_file(
        {"LayerNorm.gamma": torch.ones(8), "LayerNorm.beta": torch.zeros(8)},
        tmp_path / "model.safetensors",
    )
    assert same_base(fingerprint(layer), fingerprint(tmp_path)) == []
