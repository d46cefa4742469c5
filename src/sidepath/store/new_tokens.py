"""Tokens that an adapter brings: its entries of the tokenizer, in memory and on disk (floor 4).

The document `added_tokens.json`, {text: id}, is what transformers calls so too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from sidepath.errors import ConfigError, DamagedAdapter, StoreError
from sidepath.methods.base import Method
from sidepath.methods.lora import LoRA
from sidepath.methods.tokens import LARGEST_ID, MOST_TOKENS
from sidepath.store.peft_format import CONFIG
from sidepath.store.peft_reading import trusted_settings
from sidepath.store.tensors import file_inside, read_json, there

NAME = "added_tokens.json"
LONGEST = 256
"""Characters of the longest token."""


def add_tokens(tokenizer: Any, texts: Iterable[str]) -> dict[str, int]:
    """Let a tokenizer know each text as one token; returns their ids. In place.

    They are plain entries: found as they stand, in the middle of words too, and kept in decoded
    text. One that the tokenizer has already keeps its id.

    Errors: `ConfigError` for texts that cannot be tokens.
    """
    from tokenizers import AddedToken

    texts = list(dict.fromkeys(texts))
    faults = _bad_texts(texts)
    if faults:
        raise ConfigError("these cannot be tokens", faults=faults)
    known = tokenizer.get_vocab()
    new = [AddedToken(text, normalized=False) for text in texts if text not in known]
    if new:
        tokenizer.add_tokens(new)
    return {text: int(tokenizer.convert_tokens_to_ids(text)) for text in texts}


def extend(tokenizer: Any, tokens: Mapping[str, int]) -> bool:
    """Add an adapter's tokens to its base's tokenizer under their ids. In place; whether any was
    missing.

    Errors: `StoreError` where the tokenizer gives some another id.
    """
    known = tokenizer.get_vocab()
    missing = sorted((i, text) for text, i in tokens.items() if text not in known)
    wrong = [
        f"{text!r}: {known[text]}, the adapter has {i}"
        for text, i in tokens.items()
        if known.get(text, i) != i
    ]
    # A tokenizer numbers what is added behind the last that it has.
    first = 1 + max(known.values(), default=-1)
    wrong += [
        f"{text!r}: would be {would}, the adapter has {i}"
        for would, (i, text) in enumerate(missing, start=first)
        if would != i
    ]
    if not wrong:
        found = add_tokens(tokenizer, [text for _, text in missing])
        wrong = [
            f"{text!r}: {found[text]}, the adapter has {i}"
            for i, text in missing
            if found[text] != i
        ]
    if wrong:
        raise StoreError(
            "the tokenizer gives the adapter's tokens other ids",
            faults=wrong,
            hint="use the tokenizer of the adapter's base, as it came with it",
        )
    return bool(missing)


def unknown_to(tokenizer: Any, rows: int) -> dict[str, int]:
    """The tokens added to a tokenizer that a table of so many rows has none for."""
    added: Mapping[str, int] = tokenizer.get_added_vocab()
    return {text: i for text, i in sorted(added.items(), key=_second) if i >= rows}


def _second(item: tuple[str, int]) -> int:
    return item[1]


def with_rows(config: Method, tokens: Mapping[str, int]) -> Method:
    """The settings with the rows of these tokens trained. Errors: `ConfigError` but for LoRA."""
    if not tokens:
        return config
    if not isinstance(config, LoRA):
        raise ConfigError(
            "new tokens come with LoRA alone", found=config.method, expected=LoRA.method
        )
    rows = dict.fromkeys((*config.token_rows, *sorted(tokens.values())))
    return dataclasses.replace(config, token_rows=tuple(rows))


def as_text(tokens: Mapping[str, int]) -> str:
    """The document of an adapter's tokens."""
    ordered = dict(sorted(tokens.items(), key=_second))
    return json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"


def read_tokens(
    folder: Path, rows: Collection[int], *, ours: bool
) -> tuple[dict[str, int], list[str]]:
    """The tokens that an adapter's folder names among those whose `rows` it holds, and all faults.

    In a folder of `ours` the document names no others; elsewhere it is the tokenizer's own list.
    """
    if not there(folder / NAME):
        return {}, []
    try:
        values = read_json(file_inside(folder, NAME))
        faults = _impossible(values)
    except (ValueError, StoreError) as error:
        return {}, [f"{NAME}: {error.what if isinstance(error, StoreError) else error}"]
    if faults:
        return {}, [f"{NAME}: {fault}" for fault in faults]
    wanted = set(rows)
    others = [f"{NAME}: {text!r} has no row here" for text, i in values.items() if i not in wanted]
    named = {text: i for text, i in values.items() if i in wanted}
    return named, others if ours else []


def _impossible(values: Any) -> list[str]:
    """Why this is no table of tokens."""
    if not isinstance(values, dict):
        return ["not a JSON object"]
    faults, ids = _bad_texts(values), list(values.values())
    faults += [f"{i!r:.20} is no id" for i in ids if type(i) is not int or not 0 <= i <= LARGEST_ID]
    if not faults and len({*ids}) < len(ids):
        faults.append("two tokens have one id")
    return faults


def _bad_texts(texts: Collection[str]) -> list[str]:
    """Why these cannot be tokens; half a pair of surrogates is no text that a file could hold."""
    if len(texts) > MOST_TOKENS:
        return [f"{len(texts):,} tokens, at most {MOST_TOKENS:,}"]
    return [
        f"{text[:20]!r}: a text of 1 to {LONGEST} characters is expected"
        for text in texts
        if not 1 <= len(text) <= LONGEST or any("\ud800" <= one <= "\udfff" for one in text)
    ]


def tokens_at(folder: Path) -> dict[str, int]:
    """The tokens that an adapter's folder, ours or PEFT's, brings; its base need not be there.

    Errors: `DamagedAdapter` where the folder's settings or the document have faults.
    """
    if not there(folder / NAME) or not there(folder / CONFIG):
        return {}
    _, settings = trusted_settings(folder)
    tokens, faults = read_tokens(folder, settings.token_rows, ours=False)
    if faults:
        raise DamagedAdapter("the adapter's tokens cannot be read", where=folder, faults=faults)
    return tokens
