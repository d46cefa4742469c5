"""What a merged folder holds beside its tensors: the config, the tokenizer, what the base tells."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sidepath.errors import StoreError
from sidepath.injection.registry import Installed
from sidepath.store import manifest as manifests
from sidepath.store.configs import has_tokenizer, tokenizer_in, understood
from sidepath.store.fingerprint import INDEX
from sidepath.store.new_tokens import extend
from sidepath.store.parity import PARITY

_REFUSED = "transformers does not write the settings of the merged model"
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = (PARITY, manifests.NAME, "config.json", INDEX)


def write_settings(
    model: Any, cls: Any, stored: Mapping[str, torch.dtype], base: Path, folder: Path
) -> None:
    """The merged model's config, and the base's tokenizer and whatever else its folder tells.

    Errors: `StoreError` for settings that transformers does not write; any `OSError` of writing.
    """
    dtypes = (stored[name] for name, _ in model.named_parameters() if name in stored)
    first = next(dtype for dtype in dtypes if dtype.is_floating_point)
    model.config.dtype = str(first).removeprefix("torch.")
    model.config.architectures = [cls.__name__]
    with understood(base, _REFUSED, not_of_it=(OSError,)):
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    for path in sorted(base.iterdir()):
        left_out = path.name in _NOT_COPIED or path.name.startswith("adapter_")
        if path.is_file() and path.suffix in _COPIED and not left_out:
            shutil.copyfile(path, folder / path.name)


def write_tokens(installed: Installed, base: Path, folder: Path) -> None:
    """The base's tokenizer with the adapter's new tokens, in the place of the copied one.

    Nothing is done for an adapter that brings none, nor where the base has no tokenizer.
    Errors: `StoreError` where the tokenizer cannot be had or gives the tokens other ids; `OSError`.
    """
    if not installed.tokens or not has_tokenizer(base):
        return
    tokenizer = tokenizer_in(base)
    if extend(tokenizer, installed.tokens):
        with understood(base, "the tokenizer cannot be written", not_of_it=(OSError, StoreError)):
            tokenizer.save_pretrained(folder)
