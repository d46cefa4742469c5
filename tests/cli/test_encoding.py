"""The verb serve for encoders, and for one adapter that is merged: processes that are asked."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import sidepath
from sidepath import LoRA
from sidepath.cli.encoding import encodes
from tests.conftest import randomise, tiny_bert

from .conftest import Run, write_tokenizer
from .serving import serving


def write_encoder(folder: Path) -> Path:
    """A tiny BERT without a head, that says how it is pooled; and an adapter beside it."""
    from transformers import BertModel

    config = tiny_bert().config
    config.vocab_size = 259
    torch.manual_seed(3)
    model = BertModel(config)
    model.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{number}_{kind}"}
        for number, kind in enumerate(kinds)
    ]
    (folder / "base" / "modules.json").write_text(json.dumps(modules))
    (folder / "base" / "1_Pooling").mkdir()
    settings = {"pooling_mode_mean_tokens": True}
    (folder / "base" / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    loaded: Any = BertModel.from_pretrained(folder / "base")
    adapter = sidepath.inject(loaded, LoRA(r=2, targets=("query",)), name="new")
    randomise(adapter.parameters(), std=0.5)
    adapter.save(folder / "adapters" / "mine")
    return folder


@contextmanager
def served(*flags: object) -> Iterator[str]:
    """The address of a server that runs within the block and ends well."""
    with serving(*flags) as server:
        yield server.url
        server.end()


def ask(url: str, body: dict[str, Any]) -> Any:
    sent = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(sent, timeout=60) as reply:
        return json.load(reply)


def test_an_encoder_is_known_by_its_folder(tmp_path: Path, tiny_base: Path) -> None:
    folder = write_encoder(tmp_path) / "base"
    assert encodes(folder)
    (folder / "modules.json").unlink()
    assert encodes(folder), "by its architecture"
    assert not encodes(tiny_base)


@pytest.mark.slow
def test_an_encoder_answers(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path)
    flags = ("--base", folder / "base", "--adapters", folder / "adapters", "--name", "encoder")
    with served(*flags) as url:
        vectors = {}
        for name in ("encoder", "mine"):
            reply = ask(f"{url}/embeddings", {"model": name, "input": "some text"})
            vectors[name] = torch.tensor(reply["data"][0]["embedding"])
            torch.testing.assert_close(vectors[name].norm(), torch.tensor(1.0))
        assert (vectors["encoder"] - vectors["mine"]).abs().max() > 1e-3


@pytest.mark.slow
def test_one_adapter_merged(tiny_base: Path, trained: Path) -> None:
    flags = ("--base", tiny_base, "--adapters", trained.parent, "--name", "tiny-base")
    with served(*flags, "--merge", trained.name) as url:
        body = {"prompt": "count 3:", "max_tokens": 4, "temperature": 0}
        reply = ask(f"{url}/completions", body | {"model": trained.name})
        assert reply["usage"]["completion_tokens"] >= 1
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(f"{url}/completions", body | {"model": "tiny-base"})
        assert error.value.code == 404
        error.value.close()


def test_what_cannot_be_merged_is_refused(run: Run, tiny_base: Path, trained: Path) -> None:
    flags = ("--base", tiny_base, "--adapters", trained.parent, "--port", "0")
    ran = run("serve", *flags, "--merge", "countin")
    assert (ran.code, ran.out) == (2, "")
    assert 'did you mean "counting"' in ran.err
