"""Bases from their configs alone, and their tokenizers: no weight is read (floor 4)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sidepath.errors import SidepathError, StoreError
from sidepath.store.tensors import read_json


def config_of(folder: Path, **options: Any) -> Any:
    """The config of a base, `options` in the place of its own; `StoreError` if it is unusable."""
    from transformers import AutoConfig

    quiet()
    _refuse_absurd(folder / "config.json" if folder.is_dir() else folder)
    with understood(folder, "the base's config cannot be used"):
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )


def labelled(labels: Sequence[str]) -> dict[str, Any]:
    """The options of a classifier's config that name its classes, in the order of its outputs."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }


MOST_LAYERS, MOST = 4096, 2**20
"""The largest numbers of layers, and of other things, that a base is made of."""


def _refuse_absurd(path: Path) -> None:
    """Raise `StoreError` for numbers of layers, heads, classes, ... that would fill any memory."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise StoreError("the base's config cannot be used", where=path, found=error) from error
    faults = [
        f"{name}: above {most:,}"
        for name, value in _numbers(values)
        if (most := MOST_LAYERS if "layer" in name else MOST) < value
        and ("layer" in name or name.startswith("num_"))
    ]
    if faults:
        raise StoreError("the base's config names absurd sizes", where=path, faults=faults)


def _numbers(values: Any) -> Iterator[tuple[str, int]]:
    """Every whole number of a config by its key, those of configs within it too."""
    if isinstance(values, dict):
        for name, value in values.items():
            if type(value) is int:
                yield name, value
            yield from _numbers(value)


def model_without_weights(place: Path, dtype: str) -> nn.Module:
    """The base's modules on the meta device, from its config alone: a folder's, or the file.

    It is the class that the config says it was saved from, where transformers has it for configs
    of this kind; else a causal language model, or the first of `_TASKS` that there is one for.
    """
    import transformers

    settings = config_of(place)
    with understood(place, "the base's config cannot be used"), torch.device("meta"):
        stored = getattr(torch, dtype) if dtype != "auto" else settings.dtype
        auto = getattr(transformers, f"AutoModel{_task_of(settings)}")
        model: nn.Module = auto.from_config(
            settings, dtype=stored or torch.float32, trust_remote_code=False
        )
    return model


_TASKS = {
    "ForCausalLM": "FOR_CAUSAL_LM_",
    "ForSeq2SeqLM": "FOR_SEQ_TO_SEQ_CAUSAL_LM_",
    "ForSequenceClassification": "FOR_SEQUENCE_CLASSIFICATION_",
    "ForImageClassification": "FOR_IMAGE_CLASSIFICATION_",
    "ForMaskedLM": "FOR_MASKED_LM_",
    "": "",
}
"""transformers' automatic classes, and what its tables of classes by model type are called."""


def _task_of(settings: Any) -> str:
    """Which of the automatic classes makes the model of a config: see `model_without_weights`."""
    from transformers.models.auto import modeling_auto

    named = set(settings.architectures or ())
    known: dict[str, set[str]] = {}
    for task, table in _TASKS.items():
        found = getattr(modeling_auto, f"MODEL_{table}MAPPING_NAMES").get(settings.model_type)
        if found is not None:
            known[task] = {found} if isinstance(found, str) else set(found)
    as_saved = [task for task, classes in known.items() if classes & named]
    return next(iter([*as_saved, *known]), "ForCausalLM")


def skeleton(kind: Any, settings: Any, folder: Path) -> nn.Module:
    """The model that an automatic class makes of a config, on the meta device."""
    with understood(folder, "the base's config cannot be used"), torch.device("meta"):
        model: nn.Module = kind.from_config(settings, trust_remote_code=False)
    return model


_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether a transformers folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER)


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer of a transformers folder. Errors: `StoreError` for one that cannot be used."""
    from transformers import AutoTokenizer

    with understood(folder, "the base's tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def quiet() -> None:
    """Keep transformers' bars and advice off the terminal; its errors still raise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def understood(
    folder: Path, what: str, *, not_of_it: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn whatever another library raises over a user's folder into one message of ours.

    Our own errors come through, and those that are `not_of_it`: have another cause than the folder.
    """
    try:
        with redirect_stderr(io.StringIO()):
            yield
    except Exception as error:
        if isinstance(error, (SidepathError, *not_of_it)):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise StoreError(what, where=folder, found=text[:300]) from error
