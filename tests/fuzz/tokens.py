"""Readers of adapters that bring tokens: ours, PEFT's, the document of their texts, their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sidepath import LoRA
from sidepath.analyse.tokens import rows_of_tokens
from sidepath.store import new_tokens
from sidepath.store.peft_format import CONFIG, WEIGHTS, pack
from sidepath.store.peft_tokens import INDICES
from sidepath.store.plain_format import slots_of
from sidepath.store.saving import views_of
from tests.fuzz.adapters import MANIFEST, OURS, loaded, own_files
from tests.fuzz.reader import Files, Reader, Refused, plain, tensors_in

TOKENS = LoRA(r=2, targets=("q_proj",), token_rows=(64, 9, 65))
NAMED = {"<sql>": 64, "<end>": 65}


def token_files() -> Files:
    return own_files(TOKENS, new_tokens=NAMED)


def peft_token_files() -> Files:
    files = token_files()
    return {name: files[name] for name in (WEIGHTS, CONFIG, new_tokens.NAME)}


def read_token_adapter(folder: Path) -> Any:
    with loaded(folder) as adapter:
        installed = adapter.installed
        slots = slots_of(installed, dict(adapter.model.named_modules()))
        tensors = plain(pack(installed.deltas, views_of(adapter.model, installed), slots))
        return tensors, list(adapter.config.token_rows), dict(adapter.tokens)


def token_adapter_says(folder: Path) -> Any:
    if (folder / MANIFEST).exists():
        ids = json.loads((folder / MANIFEST).read_bytes())["config"]["token_rows"]
    else:
        said = json.loads((folder / CONFIG).read_bytes())[INDICES]
        ids = next(iter(said.values())) if isinstance(said, dict) else said
    return tensors_in(folder / WEIGHTS), ids, texts_say(folder, ids)


def texts_say(folder: Path, ids: list[int]) -> dict[str, int]:
    path = folder / new_tokens.NAME
    values = json.loads(path.read_bytes()) if path.exists() else {}
    return {text: i for text, i in values.items() if i in ids}


def read_texts(folder: Path) -> Any:
    found, faults = new_tokens.read_tokens(folder, (64, 9, 65), ours=False)
    if faults:
        raise Refused(str(faults))
    return found


def texts_alone() -> Files:
    return {new_tokens.NAME: token_files()[new_tokens.NAME]}


def read_rows(folder: Path) -> Any:
    return [(row["id"], row["token"], row["module"]) for row in rows_of_tokens(folder)]


def rows_say(folder: Path) -> Any:
    if not (folder / CONFIG).exists():
        return []
    said = json.loads((folder / CONFIG).read_bytes()).get(INDICES)
    ids = next(iter(said.values()), []) if isinstance(said, dict) else said or []
    texts = {i: text for text, i in texts_say(folder, ids).items()}
    ending = ".token_adapter.trainable_tokens_delta"
    return [
        (i, texts.get(i), key.removeprefix("base_model.model.").removesuffix(ending))
        for key in tensors_in(folder / WEIGHTS)
        if key.endswith(ending)
        for i in ids
    ]


READERS = (
    Reader("new tokens", token_files, read_token_adapter, token_adapter_says, share=1.5, **OURS),
    Reader("new tokens, PEFT's", peft_token_files, read_token_adapter, token_adapter_says),
    Reader(
        "texts of tokens", texts_alone, read_texts, lambda folder: texts_say(folder, [64, 9, 65])
    ),
    Reader("rows of tokens", peft_token_files, read_rows, rows_say),
)
