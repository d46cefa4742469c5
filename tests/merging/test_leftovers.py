"""Tensors that the base's model has no place for are in the merged folder, bit for bit."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidepath.errors import StoreError, WriteFailed
from sidepath.merging.merge import merge_folder
from sidepath.methods.lora import LoRA
from sidepath.store.adapter import inject
from tests.conftest import randomise, tiny_llama

EXTRA = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),  # never told of
    "model.mtp.0.weight": torch.arange(6).bfloat16(),
    "counts": torch.arange(3),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(params=["one file", "shards"])
def base(request: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shard = "1GB" if request.param == "one file" else "20kB"
    tiny_llama().bfloat16().save_pretrained(folder, max_shard_size=shard)
    path = sorted(folder.glob("*.safetensors"))[0]
    save_file({**load_file(path), **EXTRA}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text())
        values["weight_map"] |= dict.fromkeys(EXTRA, path.name)
        index.write_text(json.dumps(values))
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    made = inject(tiny_llama().bfloat16(), LoRA(r=2), "x")
    randomise(made.parameters(), 0.2)
    return made.save(tmp_path / "a")


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_they_are_carried_over_and_counted(
    tmp_path: Path, base: Path, adapter: Path, dtype: str | None
) -> None:
    found = merge_folder(base, [adapter], tmp_path / "out", dtype=dtype)
    assert found.carried is not None
    assert sorted(found.carried["names"]) == sorted(EXTRA)
    assert found.carried["tensors"] == 3
    assert found.carried["bytes"] == sum(tensor.nbytes for tensor in EXTRA.values())
    stored: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(path)
    before: dict[str, torch.Tensor] = {}
    for path in base.glob("*.safetensors"):
        before |= load_file(path)
    assert set(stored) == set(before)
    for name, tensor in EXTRA.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)
    record = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert record["carried"]["tensors"] == 3
    index = tmp_path / "out" / "model.safetensors.index.json"
    if index.exists():
        assert set(json.loads(index.read_text())["weight_map"]) == set(before)


def test_a_type_that_is_not_copied_is_refused(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sidepath.merging import leftovers

    monkeypatch.delitem(leftovers._TORCH, "I64")
    with pytest.raises(StoreError, match="counts: I64"):
        merge_folder(base, [adapter], tmp_path / "out", skip_parity=True)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_no_fault_of_the_base(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.LlamaConfig, "save_pretrained", full)
    with pytest.raises(WriteFailed) as caught:
        merge_folder(base, [adapter], tmp_path / "out", skip_parity=True)
    assert "No space left" in str(caught.value)
    assert not (tmp_path / "out").exists()

    def invalid(*_: object, **__: object) -> None:
        raise ValueError("such settings are not saved")

    monkeypatch.setattr(transformers.LlamaConfig, "save_pretrained", invalid)
    with pytest.raises(StoreError, match="does not write the settings"):
        merge_folder(base, [adapter], tmp_path / "out", skip_parity=True)
