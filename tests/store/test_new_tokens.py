"""An adapter carries its tokens: their texts, their ids and their rows, and no others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sidepath
from sidepath import LoRA
from sidepath.errors import ConfigError, DamagedAdapter, StoreError
from sidepath.store.adapter import inject, load
from sidepath.store.new_tokens import NAME, add_tokens, extend, read_tokens
from sidepath.store.plan import plan
from tests.conftest import outputs, randomise, tiny_llama

SIZE = 258
"""Tokens of the byte tokenizer."""
TEXTS = ("<sql>", "<end>")
WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated", "ignore:.*sidepath.json"
)


def base(tied: bool, size: int = SIZE) -> Any:
    return tiny_llama(size, layers=1, tied=tied)


def made(tokenizer: Any, tied: bool = False, size: int = SIZE, **more: Any) -> Any:
    tokens = add_tokens(tokenizer, TEXTS)
    config = LoRA(r=2, targets=("q_proj",), **more)
    adapter = inject(base(tied, size), config, "a", new_tokens=tokens)
    randomise(adapter.parameters(), 0.3)
    return adapter


@pytest.mark.parametrize("size", [SIZE, SIZE + 6], ids=["grown", "padded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_and_loaded_it_is_the_same(
    tokenizer: Any, tmp_path: Path, tied: bool, size: int
) -> None:
    plain = copy.deepcopy(tokenizer)
    adapter = made(tokenizer, tied, size)
    folder = adapter.save(tmp_path / "a")
    assert json.loads((folder / NAME).read_text()) == {"<sql>": SIZE, "<end>": SIZE + 1}
    assert NAME in json.loads((folder / "sidepath.json").read_text())["files"]
    stored = load_file(folder / WEIGHTS)
    rows = [tensor for key, tensor in stored.items() if key.endswith("trainable_tokens_delta")]
    assert [tuple(tensor.shape) for tensor in rows] == [(2, 32)] * (1 if tied else 2)
    predicted = plan(base(tied, size), adapter.config)
    assert predicted.adapter_bytes == (folder / WEIGHTS).stat().st_size
    assert predicted.trainable == sum(tensor.numel() for tensor in stored.values())
    model = base(tied, size)
    again = load(model, folder, "b")
    assert again.tokens == adapter.tokens
    again.extend(plain)
    ids = torch.tensor([plain("a<sql>b<end>")["input_ids"]])
    assert ids.tolist() == [tokenizer("a<sql>b<end>")["input_ids"]]
    assert {SIZE, SIZE + 1} < set(ids[0].tolist())
    assert plain.decode(ids[0], skip_special_tokens=True) == "a<sql>b<end>"
    assert torch.equal(outputs(model, ids), outputs(adapter.model, ids))
    assert load_file(again.save(tmp_path / "b") / WEIGHTS).keys() == stored.keys()
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_peft_reads_it_once_its_user_made_the_table_longer(
    tokenizer: Any, tmp_path: Path, tied: bool
) -> None:
    import peft

    adapter = made(tokenizer, tied, dtype="base")
    folder = adapter.save(tmp_path / "a")
    longer: Any = base(tied)
    longer.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(longer, folder).eval()
    ids = torch.tensor([tokenizer("a<sql>b<end>")["input_ids"]])
    torch.testing.assert_close(
        outputs(theirs, ids), outputs(adapter.model, ids), rtol=1e-4, atol=1e-5
    )
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    (tmp_path / "theirs" / NAME).write_bytes((folder / NAME).read_bytes())
    again = load(base(tied), tmp_path / "theirs", "b")
    assert again.tokens == adapter.tokens
    assert torch.equal(outputs(again.model, ids), outputs(adapter.model, ids))
    assert load_file(tmp_path / "theirs" / WEIGHTS).keys() == load_file(folder / WEIGHTS).keys()
    back = again.save(tmp_path / "back")
    assert (back / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_rows_that_peft_trained_of_the_embedding_alone(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[9, 5])
    theirs = peft.get_peft_model(base(tied=False), config)
    randomise((p for p in theirs.parameters() if p.requires_grad), 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = load(base(tied=False), tmp_path / "theirs", "a")
    assert isinstance(adapter.config, LoRA)
    assert adapter.config.token_rows == (9, 5)
    assert [site.path for site in adapter.installed.sites.values() if site.kind == "tokens"] == [
        "model.embed_tokens"
    ]
    ids = torch.tensor([[1, 5, 9, 5, 40]])
    torch.testing.assert_close(
        outputs(adapter.model, ids), outputs(theirs.eval(), ids), rtol=1e-4, atol=1e-5
    )
    settings = tmp_path / "theirs" / "adapter_config.json"
    values = json.loads(settings.read_text())
    for indices, said in (
        ([], "expected \\[0, 32\\]"),
        ([9, 9], "names a token twice"),
        ([9, -5], "no token id"),
        ({"a": [5], "b": [9]}, "other tokens for one table"),
        ([9, SIZE], "no row for token 258, which is added"),
        ([9, 5, 7], "expected \\[3, 32\\]"),
    ):
        settings.write_text(json.dumps({**values, "trainable_token_indices": indices}))
        with pytest.raises(DamagedAdapter, match=said):
            load(base(tied=False), tmp_path / "theirs", "a")


def test_a_tokenizer_that_numbers_them_otherwise_is_refused(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    add_tokens(other, ["<other>"])
    tokens = add_tokens(tokenizer, TEXTS)
    assert tokens == {"<sql>": SIZE, "<end>": SIZE + 1}
    before = other.get_vocab()
    with pytest.raises(StoreError, match="would be 259, the adapter has 258"):
        extend(other, tokens)
    assert other.get_vocab() == before
    with pytest.raises(StoreError, match="'a': 66, the adapter has 258"):
        extend(other, {"a": 258})
    assert not extend(tokenizer, tokens)
    with pytest.raises(ConfigError, match="1 to 256 characters"):
        add_tokens(tokenizer, ["x" * 257, "", "\ud800"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "not a JSON object"),
        ('{"<sql>": 258, "<end>": 258}', "two tokens have one id"),
        ('{"<sql>": true}', "is no id"),
        ('{"<sql>": -1}', "is no id"),
        ('{"": 258}', "1 to 256 characters"),
        ('{"<sql>": 258, "<sql>": 259}', "duplicate keys"),
        ('{"<sql>": 300}', "has no row here"),
    ],
)
def test_a_damaged_document(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / NAME).write_text(text)
    tokens, faults = read_tokens(tmp_path, (258, 259), ours=True)
    assert said in str(faults)
    if "no row" in said:
        assert read_tokens(tmp_path, (258, 259), ours=False) == ({}, [])
    else:
        assert tokens == {}


def test_a_document_that_the_manifest_does_not_list_is_refused(
    tokenizer: Any, tmp_path: Path
) -> None:
    adapter = inject(base(tied=False), LoRA(r=2, token_rows=(258,)), "a")
    folder = adapter.save(tmp_path / "a")
    (folder / NAME).write_text('{"<sql>": 258}')
    with pytest.raises(DamagedAdapter, match="not listed"):
        load(base(tied=False), folder)
    sidepath.remove(adapter.model, "a")
    saved = made(tokenizer).save(tmp_path / "b")
    (saved / NAME).write_text('{"<sql>": 259, "<end>": 258}\n')
    with pytest.raises(DamagedAdapter, match=NAME):
        load(base(tied=False), saved)


def test_tokens_that_the_file_has_no_rows_for_are_refused(tmp_path: Path) -> None:
    adapter = inject(base(tied=False), LoRA(r=2), "a")
    folder = adapter.save(tmp_path / "a")
    (folder / "sidepath.json").unlink()
    settings = folder / "adapter_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps({**values, "trainable_token_indices": [5]}))
    with pytest.raises(DamagedAdapter, match="1 tokens, and rows at 0 modules"):
        load(base(tied=False), folder, "b")
