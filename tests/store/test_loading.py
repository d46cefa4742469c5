"""A file's bytes become tensors in one pass: read once, digested, looked at, never copied."""

from __future__ import annotations

import hashlib
import json
import struct
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sidepath.errors import DamagedAdapter, WrongBase
from sidepath.injection.registry import registry_of, require_registry
from sidepath.injection.surgery import remove
from sidepath.methods.lora import LoRA
from sidepath.store import loading, manifest
from sidepath.store.adapter import inject, load
from sidepath.store.folder import sha256_file
from sidepath.store.loading import load_tensors
from sidepath.store.loralib_format import load_loralib
from sidepath.store.tensors import FLOATING, read_head, read_header
from tests.calls import calls_in
from tests.conftest import outputs, randomise, tiny_gpt2, tiny_llama
from tests.faults import flip_bit

WEIGHTS = "adapter_model.safetensors"
DTYPES = tuple(FLOATING.values())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_all_or_some_tensors_are_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shapes = data.draw(
        st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=7)
    )
    tensors = {
        f"t{number}": torch.randn(shape).to(data.draw(st.sampled_from(DTYPES)))
        for number, shape in enumerate(shapes)
    }
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    save_file(tensors, path)
    header = read_header(path)
    asked = data.draw(st.sets(st.sampled_from(sorted(tensors)), min_size=1))
    expected = load_file(path)
    for names in (list(header), [name for name in header if name in asked]):
        found = load_tensors(path, {name: header[name] for name in names})
        assert list(found) == names
        for name in names:
            assert found[name].dtype == expected[name].dtype
            assert found[name].shape == expected[name].shape
            assert torch.equal(found[name], expected[name])


def test_numbers_that_do_not_lie_where_their_dtype_must_are_read_too(tmp_path: Path) -> None:
    """Other tools write tensors at odd offsets: half precision first, then float32."""
    half, single = torch.randn(3).half(), torch.randn(2, 2)
    entries = {
        "half": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]},
        "single": {"dtype": "F32", "shape": [2, 2], "data_offsets": [6, 22]},
    }
    text = json.dumps(entries).encode()
    text += b" " * (7 - len(text) % 8)  # the numbers begin at an odd byte of the file
    body = half.numpy().tobytes() + single.numpy().tobytes()
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    found = load_tensors(path, read_header(path))
    assert torch.equal(found["half"], half)
    assert torch.equal(found["single"], single)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_number_that_is_not_finite_is_found_anywhere(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_PIECE", 64)
    info, path = torch.finfo(dtype), tmp_path / "t.safetensors"
    extremes = [info.max, -info.max, info.smallest_normal, info.smallest_normal / 2, 0.0, -0.0]
    good = torch.tensor(extremes * 11, dtype=dtype)

    def found(tensor: Tensor) -> Tensor:
        save_file({"a": tensor[:20].clone(), "b": tensor[20:].clone()}, path)
        return torch.cat(list(load_tensors(path, read_header(path)).values()))

    assert torch.equal(found(good), good)
    for at in range(len(good)):
        for value in (float("nan"), float("inf"), float("-inf")):
            bad = good.clone()
            bad[at] = value
            name, size = ("a", 20) if at < 20 else ("b", 46)
            with pytest.raises(DamagedAdapter, match=f"{name}: 1 of {size} values are NaN or Inf"):
                found(bad)


def test_the_digest_is_of_the_bytes_that_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.randn(7), "b": torch.randn(3, 3).half()}, path)
    header, head = read_head(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with loading.loading(path, header, (head, digest)) as loaded:
        assert set(loaded.tensors) == {"a", "b"}
        loaded.settle()
    flip_bit(path)
    for first in (head, head[:-1] + b"x"):
        with (
            pytest.raises(DamagedAdapter, match="not those that were saved"),
            loading.loading(path, header, (first, digest)) as loaded,
        ):
            loaded.settle()
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DamagedAdapter, match="became shorter"):
        load_tensors(path, header)


def test_wrong_bytes_are_the_reason_for_whatever_else_goes_wrong(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.tensor([1.0, float("nan")])}, path)
    header, head = read_head(path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    wrong = "0" * 64
    with pytest.raises(DamagedAdapter, match="NaN"):
        loading.loading(path, header, (head, right)).__enter__()
    with pytest.raises(DamagedAdapter, match="not those that were saved"):
        loading.loading(path, header, (head, wrong)).__enter__()
    save_file({"a": torch.ones(2)}, path)
    header, head = read_head(path)
    with (
        pytest.raises(DamagedAdapter, match="not those that were saved"),
        loading.loading(path, header, (head, wrong)),
    ):
        raise ValueError("of what the wrong bytes led to")
    with (
        pytest.raises(DamagedAdapter, match="not those that were saved"),
        loading.loading(path, header, (head, wrong)),
    ):
        pass  # nobody asked, and it is said all the same


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small adapter of ours."""
    adapter = inject(tiny_llama(), LoRA(r=2), "a")
    randomise(adapter.parameters())
    return adapter.save(tmp_path / "a")


def test_loading_reads_every_byte_of_the_weights_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    class Counted(FileIO):
        def readinto(self, buffer: Any) -> int:
            size = super().readinto(buffer)
            read.append((self.tell() - size, size))
            return size

    digested: list[str] = []

    def noted(path: Path) -> str:
        digested.append(Path(path).name)
        return sha256_file(path)

    monkeypatch.setattr(loading, "open", lambda path, *a, **k: Counted(path, "rb"), raising=False)
    monkeypatch.setattr(manifest, "sha256_file", noted)
    load(tiny_llama(), folder)
    _, head = read_head(folder / WEIGHTS)
    at = len(head)
    for start, size in read:
        assert start == at
        at += size
    assert at == (folder / WEIGHTS).stat().st_size
    assert sorted(digested) == ["README.md", "adapter_config.json"]


def test_the_deltas_are_the_files_own_memory_and_draw_nothing_random(folder: Path) -> None:
    model = tiny_llama()
    state = torch.get_rng_state()
    adapter = load(model, folder)
    storages = {parameter.untyped_storage().data_ptr() for parameter in adapter.parameters()}
    assert len(storages) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in adapter.parameters())
    again = load(model, folder, "b", trainable=True)
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())
    assert storages.isdisjoint(p.untyped_storage().data_ptr() for p in again.parameters())


def test_loading_costs_the_same_whatever_is_loaded(folder: Path) -> None:
    """Python calls counted, with one adapter on the model and with thirty."""
    model = tiny_llama()
    load(model, folder, "first")
    load(model, folder, "again")
    few = counted(model, folder)
    remove(model, "x")
    for number in range(30):
        load(model, folder, f"a{number}")
    assert counted(model, folder) == few


def counted(model: nn.Module, folder: Path) -> int:
    """Calls of one more load; without those of waiting for the digest's thread, which chance is."""
    calls = calls_in(lambda: load(model, folder, "x"))
    return sum(not any(word in call for word in ("concurrent", "threading")) for call in calls)


@pytest.mark.parametrize("how", ["in place", "behind torch's back"])
def test_a_base_changed_by_hand_after_a_load_is_found_out(folder: Path, how: str) -> None:
    """Nothing of the base is remembered between loads: `p.data.copy_` leaves no trace elsewhere."""
    model = tiny_llama()
    load(model, folder, "a")
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    version = weight._version
    if how == "in place":
        with torch.no_grad():
            weight.mul_(1.5)
    else:
        weight.data.copy_(1.5 * weight.data)
        assert weight._version == version
    with pytest.raises(WrongBase, match="up_proj"):
        load(model, folder, "b")
    assert list(require_registry(model).adapters) == ["a"]


def test_bad_weights_are_refused_before_the_model_is_touched(folder: Path) -> None:
    flip_bit(folder / WEIGHTS, -5)
    model = tiny_llama()
    with pytest.raises(DamagedAdapter, match="not those that were saved"):
        load(model, folder)
    assert registry_of(model) is None


def test_changed_weights_are_named_beside_other_faults(folder: Path) -> None:
    flip_bit(folder / WEIGHTS, -5)
    with pytest.raises(DamagedAdapter) as caught:
        load(tiny_gpt2(), folder)
    assert any("no such module" in fault for fault in caught.value.faults)
    assert any(fault.startswith(f"{WEIGHTS}: its bytes") for fault in caught.value.faults)


def test_loralib_tensors_stay_their_givers(folder: Path) -> None:
    model = tiny_llama()
    path = "model.layers.0.self_attn.q_proj"
    state = {f"{path}.lora_A": torch.randn(2, 32), f"{path}.lora_B": torch.randn(32, 2)}
    adapter = load_loralib(model, state, alpha=2)
    before = outputs(model, torch.tensor([[1, 2, 3]]))
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(outputs(model, torch.tensor([[1, 2, 3]])), before)
    assert all(bool(parameter.any()) for parameter in adapter.parameters())
