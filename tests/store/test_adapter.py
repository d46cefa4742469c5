"""Saving and loading: equal to the bit, or refused with every reason at once."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sidepath.combining import ingredients
from sidepath.combining.combine import combine
from sidepath.errors import (
    BadName,
    DamagedAdapter,
    MergeError,
    NameTaken,
    SidepathError,
    StoreError,
    UnknownAdapter,
    WriteFailed,
    WrongBase,
)
from sidepath.injection.merging import merge
from sidepath.injection.registry import registry_of
from sidepath.injection.surgery import activate, remove
from sidepath.methods.lora import LoRA
from sidepath.store import contents, saving
from sidepath.store.adapter import Adapter, inject, load
from sidepath.store.plan import plan
from tests.conftest import outputs, randomise, tiny_bert, tiny_gpt2, tiny_llama
from tests.faults import flip_bit

IDS = torch.tensor([[5, 9, 3, 17, 22], [1, 2, 3, 4, 5]])
WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "sidepath.json"
SMALL = LoRA(r=2, targets=("q_proj",), layers=(0,))


def trained(model: nn.Module, config: LoRA = SMALL, name: str = "a") -> Adapter:
    adapter = inject(model, config, name)
    randomise(adapter.parameters(), 0.3)
    return adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small adapter of ours."""
    return trained(tiny_llama()).save(tmp_path / "a")


@pytest.fixture
def plain(folder: Path) -> Path:
    """The same as a folder of PEFT's: no manifest."""
    (folder / MANIFEST).unlink()
    return folder


def load_quietly(model: nn.Module, folder: Path, **options: Any) -> Adapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(model, folder, **options)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "base"])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same_to_the_bit(
    tmp_path: Path, make: Callable[[], Any], dtype: Any, base_dtype: torch.dtype
) -> None:
    base = make().to(base_dtype)
    model = copy.deepcopy(base)
    adapter = trained(model, LoRA(r=3, dtype=dtype))
    adapter.save(tmp_path / "a")
    loaded = load(base, tmp_path / "a", "b")
    pairs = list(zip(adapter.parameters(), loaded.parameters(), strict=True))
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in pairs)
    assert torch.equal(outputs(base, IDS), outputs(model, IDS))
    assert loaded.config == adapter.config
    assert loaded.save(tmp_path / "b").is_dir()
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "a" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (tiny_llama, LoRA(r=4)),
        (tiny_llama, SMALL),
        (tiny_gpt2, LoRA(r=2, targets=("c_attn:q,v", "wpe"), bias="all")),
        (tiny_bert, LoRA(r=2, train_whole=("classifier",), dtype="bfloat16")),
    ],
)
def test_the_files_size_is_foretold_within_one_percent(
    tmp_path: Path, make: Callable[[], Any], config: LoRA
) -> None:
    foretold = plan(make(), config).adapter_bytes
    trained(make(), config).save(tmp_path / "a")
    size = (tmp_path / "a" / WEIGHTS).stat().st_size
    assert abs(foretold - size) <= 0.01 * size


def test_the_base_is_not_touched_by_saving_and_loading(tmp_path: Path) -> None:
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained(model).save(tmp_path / "a")
    remove(model, "a")
    load(model, tmp_path / "a")
    remove(model, "a")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_saving_while_merged_records_the_base_as_it_was(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = trained(model)
    merge(model, "a")
    adapter.save(tmp_path / "a")
    assert torch.allclose(outputs(model, IDS), outputs_of_loaded(tmp_path / "a"), atol=1e-5)


def outputs_of_loaded(folder: Path) -> Tensor:
    model = tiny_llama()
    load(model, folder, "x")
    return outputs(model, IDS)


def test_the_folder_holds_what_it_says(folder: Path) -> None:
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG, WEIGHTS, MANIFEST]
    card = (folder / "README.md").read_text()
    assert card.startswith(
        "---\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n"
    )
    assert "| r | 2 |" in card


def test_the_record_is_kept_and_grows(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = trained(model)
    record = {"seed": 3, "data": {"rows": 10, "digest": "abc"}, "command": "train"}
    adapter.save(
        tmp_path / "a", metrics={"loss": 1.5}, record=record, files={"run.toml": "r = 2\n"}
    )
    again = load(tiny_llama(), tmp_path / "a", "b")
    again.save(tmp_path / "c", record={"note": "second"})
    last = load(tiny_llama(), tmp_path / "c", "d").record
    assert last["seed"] == 3
    assert last["data"] == record["data"]
    assert last["metrics"] == {"loss": 1.5}
    assert last["note"] == "second"
    assert last["versions"]["torch"]
    assert (tmp_path / "a" / "run.toml").read_text() == "r = 2\n"


@pytest.mark.parametrize("name", ["../x", "a/b", WEIGHTS, MANIFEST])
def test_extra_files_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="cannot have this name"):
        trained(tiny_llama()).save(tmp_path / "a", files={name: "x"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"x"])
def test_a_record_that_json_cannot_hold_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        trained(tiny_llama()).save(tmp_path / "a", record={"x": value})
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_earlier_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(WriteFailed, match="No space left"):
        trained(tiny_llama()).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == ["a"]


def test_any_flipped_bit_is_refused(tmp_path: Path) -> None:
    """Exhaustive: every bit of every file of an adapter, on disk, through the real `load`."""
    model = nn.Sequential(nn.Linear(3, 2))
    folder = trained(copy.deepcopy(model), LoRA(r=1, targets=("0",))).save(tmp_path / "a")
    tried = 0
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        with open(path, "r+b", buffering=0) as file:
            for at, bit in itertools.product(range(len(good)), range(8)):
                os.pwrite(file.fileno(), bytes([good[at] ^ 1 << bit]), at)
                try:
                    load(model, folder)
                except DamagedAdapter:
                    tried += 1
                if bit == 7:
                    os.pwrite(file.fileno(), good[at : at + 1], at)
    assert tried == 8 * sum(path.stat().st_size for path in folder.iterdir()) > 20_000
    assert registry_of(model) is None
    load(model, folder)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def change_tensors(folder: Path, **changes: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name, change in changes.items():
        key = {"A": A, "B": B}.get(name, name)
        found = change(tensors[key]) if key in tensors else change(None)
        tensors.pop(key, None)
        if found is not None:
            tensors[key] = found
    save_file(tensors, folder / WEIGHTS)


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def put(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN": (lambda f: change_tensors(f, A=put(float("nan"))), "1 of 64 values are NaN"),
    "Inf": (lambda f: change_tensors(f, B=put(float("inf"))), "1 of 64 values are NaN or Inf"),
    "integers": (lambda f: change_tensors(f, A=lambda t: t.long()), "dtype I64"),
    "missing key": (lambda f: change_tensors(f, B=lambda t: None), "lora_B.weight: missing"),
    "extra key": (lambda f: change_tensors(f, extra=lambda t: torch.ones(2)), "extra: unexpected"),
    "extra layer": (
        lambda f: change_tensors(f, **{A.replace("q_proj", "x_proj"): lambda t: torch.ones(2, 32)}),
        r"x_proj: the base has no such module; the nearest are",
    ),
    "wrong shape": (
        lambda f: change_tensors(f, A=lambda t: torch.ones(2, 33)),
        r"shape \[2, 33\], expected \[2, 32\]",
    ),
    "r against shapes": (lambda f: change_config(f, r=3), r"shape \[2, 32\], expected \[3, 32\]"),
    "r absurd": (lambda f: change_config(f, r=10**9), "r: 1000000000, expected a whole number"),
    "r zero": (lambda f: change_config(f, r=0), "r: 0, expected"),
    "r no number": (lambda f: change_config(f, r="2"), "r: '2', expected"),
    "r true": (lambda f: change_config(f, r=True), "r: True, expected"),
    "alpha NaN": (lambda f: change_config(f, lora_alpha=float("nan")), "lora_alpha: nan"),
    "alpha absurd": (lambda f: change_config(f, lora_alpha=1e30), r"lora_alpha: 1e\+30"),
    "alpha negative": (lambda f: change_config(f, lora_alpha=-1), "lora_alpha: -1"),
    "dropout": (lambda f: change_config(f, lora_dropout=1.5), "lora_dropout: 1.5"),
    "rank pattern": (
        lambda f: change_config(f, rank_pattern={".*q_proj": 2}),
        "is a regular expression",
    ),
    "evil pattern": (
        lambda f: change_config(f, alpha_pattern={"(a+)+$": 2}),
        "is a regular expression",
    ),
    "bias": (lambda f: change_config(f, bias="some"), "bias: 'some'"),
    "DoRA": (lambda f: change_config(f, use_dora=True), "lora_magnitude_vector: missing"),
    "lora_bias": (lambda f: change_config(f, lora_bias=True), "lora_bias: True"),
    "replication": (lambda f: change_config(f, layer_replication=[[0, 2]]), "layer_replication"),
    "aLoRA": (lambda f: change_config(f, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "megatron": (lambda f: change_config(f, megatron_config={"x": 1}), "megatron_config"),
    "unknown field": (lambda f: change_config(f, surprise=None), "surprise: unknown field"),
    "PiSSA": (lambda f: change_config(f, init_lora_weights="pissa"), "changes the base's weights"),
    "other method": (lambda f: change_config(f, peft_type="IA3"), "peft_type"),
    "modules to save": (lambda f: change_config(f, modules_to_save="all"), "modules_to_save"),
    "config no JSON": (lambda f: write(f / CONFIG, "{"), "adapter_config.json: not JSON"),
    "config no object": (lambda f: write(f / CONFIG, "[]"), "not a JSON object"),
    "config twice": (lambda f: write(f / CONFIG, '{"r": 1, "r": 2}'), "duplicate keys r"),
    "no config": (lambda f: (f / CONFIG).unlink(), "adapter_config.json: a file is missing"),
    "truncated": (lambda f: truncate(f / WEIGHTS), "truncated"),
    "header": (lambda f: write(f / WEIGHTS, "\0" * 7 + "\1"), "truncated"),
    "a link out": (lambda f: link_out(f), "leads out of its folder"),
}


def write(path: Path, text: str) -> None:
    path.write_text(text)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside"
    shutil.move(folder / WEIGHTS, outside)
    (folder / WEIGHTS).symlink_to(outside)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_plain_folder_is_refused_and_the_model_untouched(plain: Path, name: str) -> None:
    damage, message = BAD[name]
    damage(plain)
    model = tiny_llama()
    with pytest.raises(DamagedAdapter, match=message):
        load_quietly(model, plain)
    assert registry_of(model) is None
    assert set(model.state_dict()) == set(tiny_llama().state_dict())


@pytest.mark.parametrize("name", BAD)
def test_the_same_damage_to_a_folder_of_ours_is_refused(folder: Path, name: str) -> None:
    BAD[name][0](folder)
    with pytest.raises(DamagedAdapter):
        load(tiny_llama(), folder)


def test_all_faults_come_at_once(plain: Path) -> None:
    change_tensors(
        plain, A=lambda t: torch.ones(2, 33), B=lambda t: None, extra=lambda t: torch.ones(1)
    )
    change_config(plain, lora_alpha=1e30, lora_bias=True, surprise=1)
    with pytest.raises(DamagedAdapter) as caught:
        load_quietly(tiny_llama(), plain)
    assert len(caught.value.faults) == 6


def test_all_changed_files_are_named(folder: Path) -> None:
    for name in (WEIGHTS, CONFIG, "README.md"):
        flip_bit(folder / name, -2)
    with pytest.raises(DamagedAdapter) as caught:
        load(tiny_llama(), folder)
    assert len(caught.value.faults) == 3


def test_patterns_of_the_file_are_never_run(plain: Path) -> None:
    expected = load_quietly(tiny_llama(), plain)
    change_config(plain, target_modules="(a+)+$", exclude_modules="(", layers_pattern="(")
    found = load_quietly(tiny_llama(), plain)
    assert list(found.deltas) == list(expected.deltas), "the keys say where, not the patterns"


def test_too_long_a_header(plain: Path) -> None:
    (plain / WEIGHTS).write_bytes(struct.pack("<Q", 9 * 2**20) + bytes(9 * 2**20))
    with pytest.raises(DamagedAdapter, match="9437184 bytes, at most 8388608"):
        load_quietly(tiny_llama(), plain)


def test_nothing_is_allocated_for_a_file_that_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(layers=1, vocab=80)

    def allocate(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("tensors were loaded")

    monkeypatch.setattr("sidepath.store.contents.loading", allocate)
    with pytest.raises(WrongBase):
        load(model, folder)


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_is_refused_and_not_run(plain: Path) -> None:
    (plain / WEIGHTS).unlink()
    (plain / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(plain / "hit")))
    with pytest.raises(StoreError, match="never loaded"):
        load(tiny_llama(), plain)
    shutil.copy(plain / "adapter_model.bin", plain / WEIGHTS)
    with pytest.raises(DamagedAdapter):
        load_quietly(tiny_llama(), plain)
    assert not (plain / "hit").exists()


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no adapter folder"):
        load(tiny_llama(), tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(StoreError, match=r"(?s)holds no adapter.*notes.txt"):
        load(tiny_llama(), tmp_path, "a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_accepted(folder: Path, dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    adapter = load(model, folder)
    assert adapter.deltas
    assert registry_of(model) is not None


def test_another_base_of_the_same_shapes_is_refused(folder: Path) -> None:
    other = tiny_llama()
    with torch.no_grad():
        other.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.01)
    with pytest.raises(
        WrongBase, match=r"(?s)up_proj.weight: other values.*allow_other_base"
    ) as caught:
        load(other, folder)
    assert len(caught.value.faults) == 1
    assert registry_of(other) is None
    load(other, folder, allow_other_base=True)


def test_a_head_trained_whole_is_no_part_of_the_base(tmp_path: Path) -> None:
    def with_new_head() -> Any:
        model = tiny_bert()
        torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
        head = model.get_submodule("classifier")
        assert isinstance(head, nn.Linear)
        head.reset_parameters()
        return model

    first, second = with_new_head(), with_new_head()
    trained(first, LoRA(r=2, targets=("query",), train_whole=("classifier",))).save(tmp_path / "a")
    load(second, tmp_path / "a")
    assert torch.equal(outputs(first, IDS), outputs(second, IDS))
    trained(with_new_head(), LoRA(r=2, targets=("query",))).save(tmp_path / "b")
    with pytest.raises(WrongBase, match="must be trained whole"):
        load(with_new_head(), tmp_path / "b")


@pytest.mark.parametrize("name", ["", "-a", ".a", "a/b", "../a", "/abs", "a" * 65, "a b", "a\n"])
def test_bad_names_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(BadName):
        load(tiny_llama(), folder, name)
    with pytest.raises(BadName):
        inject(tiny_llama(), SMALL, name)


def test_names_and_which_one_is_active(folder: Path) -> None:
    model = tiny_llama()
    alone = outputs(model, IDS)
    loaded = load(model, folder)
    assert loaded.name == "a"
    active = outputs(model, IDS)
    assert not torch.equal(active, alone)
    load(model, folder, "second")
    assert torch.equal(outputs(model, IDS), active), "a later load does not take over"
    inject(model, SMALL, "third")
    assert torch.equal(outputs(model, IDS), alone), "what is injected is what is trained next"
    with pytest.raises(NameTaken):
        load(model, folder)
    with pytest.raises(NameTaken):
        inject(model, SMALL, "third")
    activate(model, None)
    assert torch.equal(outputs(model, IDS), alone)
    remove(model, "second")
    with pytest.raises(UnknownAdapter):
        _ = Adapter("second", model).config


def test_gradients_only_where_asked(folder: Path) -> None:
    model = tiny_llama()
    assert not any(p.requires_grad for p in load(model, folder).parameters())
    assert all(p.requires_grad for p in load(model, folder, "b", trainable=True).parameters())
    assert all(p.requires_grad for p in inject(model, SMALL, "c").parameters())


def test_loading_leaves_the_random_state(folder: Path) -> None:
    model = tiny_llama()
    before = torch.get_rng_state()
    load(model, folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_loaded_or_injected_while_one_is_merged(folder: Path) -> None:
    model = tiny_llama()
    load(model, folder)
    merge(model, "a")
    with pytest.raises(MergeError):
        load(model, folder, "b")
    with pytest.raises(MergeError):
        inject(model, SMALL, "b")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest with a right digest and wrong contents, as an attacker would write it."""
    import hashlib

    path = folder / MANIFEST
    values = json.loads(path.read_text())
    del values["digest"]
    change(values)
    text = json.dumps(values, indent=2)
    head = text.removesuffix("\n}").encode() + b',\n  "digest": "'
    path.write_bytes(head + hashlib.sha256(head).hexdigest().encode() + b'"\n}\n')


FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda v: v.update(format=99), "format 99"),
    "unknown field": (lambda v: v.update(surprise=1), "unknown field surprise"),
    "missing field": (lambda v: v.pop("sites"), "malformed"),
    "method": (lambda v: v.update(method="os.system"), "method 'os.system'"),
    "config field": (lambda v: v["config"].update(surprise=1), "unknown field"),
    "config r": (lambda v: v["config"].update(r=3), r"shape \[2, 32\], expected \[3, 32\]"),
    "config r absurd": (lambda v: v["config"].update(r=10**7), "impossible value for r"),
    "config alpha": (lambda v: v["config"].update(alpha=1e30), "impossible value for alpha"),
    "file outside": (
        lambda v: v["files"].update({"../../etc/passwd": {"size": 1, "sha256": ""}}),
        "leads out of its folder",
    ),
    "file missing": (
        lambda v: v["files"].update({"gone": {"size": 1, "sha256": ""}}),
        "gone: a file is missing",
    ),
    "weights not listed": (lambda v: v["files"].pop(WEIGHTS), "not listed"),
    "tensors": (lambda v: v["tensors"].pop(A), "expected nothing"),
    "dtype": (lambda v: v["tensors"].update({A: ["BF16", [2, 32]]}), "expected .*BF16"),
    "site": (lambda v: v["sites"][0].update(path="model.nowhere"), "no such module"),
    "site kind": (lambda v: v["sites"][0].update(kind="evil"), "site"),
    "site parts": (lambda v: v["sites"][0].update(parts=[[0, 99]]), "parts"),
    "site of no matrix": (lambda v: v["sites"][0].update(path="model.norm"), "holds no matrix"),
    "fingerprint": (lambda v: v["base"]["fingerprint"].update(samples=3), "fingerprint"),
    "record": (lambda v: v.update(record=[]), "record"),
    "base name": (lambda v: v["base"].update(name=3), "not texts"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_manifest_is_refused(folder: Path, name: str) -> None:
    change, message = FORGED[name]
    rewrite(folder, change)
    with pytest.raises(DamagedAdapter, match=message):
        load(tiny_llama(), folder)


def test_parts_with_values_outside_them_are_refused(tmp_path: Path) -> None:
    config = LoRA(r=2, targets=("c_attn:q,v",), layers=(0,))
    folder = trained(tiny_gpt2(), config).save(tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    (key,) = (key for key in tensors if key.endswith("lora_B.weight"))
    tensors[key][40, 0] = 1.0
    save_file(tensors, folder / WEIGHTS)
    from sidepath.store.folder import sha256_file

    digest = sha256_file(folder / WEIGHTS)
    size = (folder / WEIGHTS).stat().st_size
    rewrite(folder, lambda v: v["files"].update({WEIGHTS: {"size": size, "sha256": digest}}))
    model = tiny_gpt2()
    with pytest.raises(DamagedAdapter, match="not zero outside the adapted parts"):
        load(model, folder)
    assert registry_of(model) is None


def test_every_error_is_ours(plain: Path) -> None:
    (plain / WEIGHTS).write_bytes(os.urandom(200))
    with pytest.raises(SidepathError):
        load_quietly(tiny_llama(), plain)


def test_a_record_that_cannot_be_written_is_not_kept(tmp_path: Path) -> None:
    """It would make every later save fail too."""
    adapter = trained(tiny_llama())
    before = dict(adapter.record)
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        adapter.save(tmp_path / "a", record={"loss": float("nan")})
    assert dict(adapter.record) == before
    adapter.save(tmp_path / "a", record={"seed": 1})
    assert adapter.record["seed"] == 1


def test_a_folder_that_may_not_be_read_is_an_error_of_ours(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(contents, "read_manifest", refused)
    with pytest.raises(StoreError, match="Permission denied"):
        load(tiny_llama(), folder)
    monkeypatch.setattr(ingredients, "read_header", refused)
    with pytest.raises(StoreError, match="Permission denied"):
        combine([folder], folder.with_name("out"))
