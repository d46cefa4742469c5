"""Bases and tokenizers from transformers folders, checked before and after (floor 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sidepath.errors import ConfigError, StoreError
from sidepath.store.configs import (
    config_of,
    labelled,
    quiet,
    skeleton,
    tokenizer_in,
    understood,
)
from sidepath.store.hub import ADAPTER, BASE, CONFIG, GRAMMAR, is_hub, local
from sidepath.store.new_tokens import extend, tokens_at


def base_folder(given: str | None) -> Path:
    """The base's folder: the given one, or the embedded base.

    Errors: `StoreError` when it is missing, not a folder, or not a transformers folder.
    """
    if given is None:
        from sidepath.base import embedded_base

        return embedded_base()
    folder = local(given, BASE)
    if not folder.is_dir():
        raise StoreError(
            "the base is not a folder" if folder.exists() else "no such base folder",
            where=folder,
            expected="a transformers folder: config.json, model.safetensors, tokenizer.json",
            hint=f"a model of the hub is named {GRAMMAR}",
        )
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise StoreError(
            "the base's folder has no config.json",
            where=folder,
            found="an adapter's folder" if adapter else None,
            expected="a transformers folder",
        )
    return folder


def config_place(given: str) -> Path:
    """Where a base's config is: a transformers folder, of which nothing else is read, or the file.

    Errors: `StoreError` as for `base_folder`.
    """
    place = local(given, CONFIG)
    return place if is_hub(given) or _is_config(place) else base_folder(given)


def _is_config(place: Path) -> bool:
    return place.is_file() and place.suffix == ".json"


def adapter_place(given: str) -> Path:
    """Where an adapter is: its folder, or a file of loralib.

    Errors: `StoreError` when there is nothing; `HubError` for a repository that cannot be had.
    """
    place = local(given, ADAPTER)
    if not place.exists():
        raise StoreError("there is no such adapter folder", where=place)
    return place


def load_tokenizer(folder: Path) -> Any:
    """The base's tokenizer, with a padding token when the folder names none."""
    tokenizer = tokenizer_in(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def tokenizer_for(folder: Path, adapter: str | Path | None) -> Any:
    """The base's tokenizer, with the tokens that an adapter brings.

    Errors: as `load_tokenizer`; `DamagedAdapter`; `StoreError` where the tokens get other ids.
    """
    tokenizer = load_tokenizer(folder)
    if adapter is not None and (tokens := tokens_at(adapter_place(str(adapter)))):
        extend(tokenizer, tokens)
    return tokenizer


def load_causal(folder: Path, dtype: str, device: str, quantise: str = "none") -> nn.Module:
    """The base as a causal language model, every weight of it from the folder.

    With `quantise="nf4"` the linear layers of its body are packed as they are read; they compute
    in `dtype`, bfloat16 when that is `auto`, and everything else is kept in it. A folder that is
    stored packed is loaded as it is. Errors: `MissingExtra` without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM

    model, fresh = _load(AutoModelForCausalLM, folder, dtype, device, {}, quantise)
    if fresh:
        raise StoreError(
            "the base's checkpoint lacks weights of a causal language model",
            where=folder,
            faults=fresh,
            hint="text with labels is learned by a classifier; everything else needs a decoder",
        )
    return model


def load_encoder(folder: Path, dtype: str, device: str, quantise: str = "none") -> nn.Module:
    """The base's body without any head, every weight of it that it answers with from the folder."""
    from transformers import AutoModel

    model, fresh = _load(AutoModel, folder, dtype, device, {}, quantise)
    lacking = [name for name in fresh if not name.startswith("pooler.")]  # never asked
    if lacking:
        raise StoreError(
            "the base's checkpoint lacks weights of its body", where=folder, faults=lacking
        )
    return model


def load_classifier(
    folder: Path,
    labels: Sequence[str],
    pad_id: int,
    dtype: str,
    device: str,
    quantise: str = "none",
) -> tuple[nn.Module, tuple[str, ...]]:
    """The base with a classification head; also the modules that no checkpoint filled.

    Those are drawn from torch's random state and have to be trained whole.
    """
    from transformers import AutoModelForSequenceClassification as Classifier

    model: Any
    model, fresh = _load(Classifier, folder, dtype, device, labelled(labels), quantise)
    text_config: Any = model.config.get_text_config()
    if text_config.pad_token_id is None:
        # A classifier reads the last token that is no padding, so it has to know which is.
        text_config.pad_token_id = pad_id
    _require_body(fresh, folder, str(model.base_model_prefix))
    return model, tuple(dict.fromkeys(name.rpartition(".")[0] for name in fresh))


def _require_body(fresh: Sequence[str], folder: Path, body: str) -> None:
    """Raise `StoreError` where parameters that no checkpoint filled are others than a head's."""
    from sidepath.injection.quantising import HEAD_PARTS

    foreign = [
        name
        for name in fresh
        if name.startswith(f"{body}.") and not set(name.split(".")) & set(HEAD_PARTS)
    ]
    if foreign:
        raise StoreError(
            "the base's checkpoint lacks weights of its body", where=folder, faults=foreign
        )


def context_tokens(folder: Path) -> int | None:
    """Most tokens the base's positions reach, or None when its config names no limit."""
    limit = vars(config_of(folder).get_text_config()).get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def device_of(name: str) -> torch.device:
    """`auto` is the GPU when there is one. Errors: `ConfigError` for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no GPU", hint="use --device cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _load(
    kind: Any,
    folder: Path,
    dtype: str,
    device: str,
    options: Mapping[str, Any],
    quantise: str,
) -> tuple[nn.Module, list[str]]:
    from sidepath.injection.quantising import settle
    from sidepath.store.fingerprint import checkpoint_files

    quiet()
    place = device_of(device)
    checkpoint_files(folder)
    packing = _packing(kind, folder, dtype, place, quantise, options)
    if "config" in packing:
        options = {}  # they are in it
    with understood(folder, "the base cannot be loaded"):
        model, notes = kind.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **{"dtype": dtype if dtype == "auto" else getattr(torch, dtype), **packing, **options},
        )
    if not packing:
        model.to(place)
    return settle(model.eval()), sorted(notes["missing_keys"])


def _packing(
    kind: Any,
    folder: Path,
    dtype: str,
    place: torch.device,
    quantise: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What transformers is asked for to load a packed base; empty for a plain one."""
    stored = vars(config_of(folder)).get("quantization_config")
    if stored is not None:
        values = stored if isinstance(stored, dict) else stored.to_dict()
        return _packed_there(kind, folder, values, place, quantise, options)
    if quantise != "none":
        return _packed_now(kind, folder, dtype, place, quantise)
    return {}


def _packed_there(
    kind: Any,
    folder: Path,
    stored: Mapping[str, Any],
    place: torch.device,
    quantise: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """For a base that is stored quantised as `stored` says; the heads stay as they are."""
    from sidepath.core.quant import require_bitsandbytes
    from sidepath.injection.quantising import keep_heads_plain

    code = stored.get("bnb_4bit_quant_type") if stored.get("load_in_4bit") else None
    if quantise not in ("none", code):
        raise ConfigError(
            f"--quantise {quantise}, but the base is stored quantised in another way",
            where=folder,
            found=stored.get("quant_method"),
            hint="leave --quantise out, or give the unquantised base",
        )
    if stored.get("quant_method") != "bitsandbytes":
        return {"device_map": {"": place}}
    require_bitsandbytes()
    settings = config_of(folder, **options)
    keep_heads_plain(settings, skeleton(kind, settings, folder))
    return {"device_map": {"": place}, "config": settings}


def _packed_now(
    kind: Any, folder: Path, dtype: str, place: torch.device, quantise: str
) -> dict[str, Any]:
    """For a plain base that is to be packed into 4 bits while it is loaded."""
    from sidepath.core.quant import require_bitsandbytes
    from sidepath.injection.quantising import left_plain

    require_bitsandbytes()
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantise,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=left_plain(skeleton(kind, config_of(folder), folder)),
    )
    return {"dtype": compute, "quantization_config": packed, "device_map": {"": place}}
