"""`adapter_config.json`, PEFT's settings of an adapter: its fields and patterns, checked (floor 4).

A file is data: where the deltas stand is read from the tensors' names, never from a pattern of
the file, and keys of rank_pattern and alpha_pattern are taken literally.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sidepath.methods.lora import MAX_ALPHA, MAX_RANK
from sidepath.store.peft_tokens import INDICES, ids_of

T = TypeVar("T")
BIAS = {"none": "none", "all": "all", "lora": "lora_only"}
"""PEFT's word for each of ours."""
_ANY_VALUE = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "target_modules", "task_type",
}  # fmt: skip
"""Fields that say nothing the tensors and the base do not say."""

_ONLY_EMPTY = {
    "alora_invocation_tokens", "arrow_config", "corda_config", "enable_lora",
    "ensure_weight_tying", "eva_config", "kasa_config", "layer_replication", "loftq_config",
    "lora_bias", "lora_ga_config", "megatron_config", "merge_weights", "monteclora_config",
    "runtime_config", "target_parameters", "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
"""Fields that change what the tensors mean: accepted while they are off."""

_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Starts that leave the base's weights alone; the others are only right on a changed base."""


@dataclass
class PeftSettings:
    """What an `adapter_config.json` says, checked."""

    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    token_rows: tuple[int, ...] = ()
    """Ids of the tokens whose rows are trained, in the file's order."""

    def rank_at(self, path: str) -> int:
        """PEFT's rank at a module: the first pattern that is the path, or its tail, wins."""
        return next((rank for key, rank in self.ranks.items() if _tail(key, path)), self.r)

    def alpha_at(self, path: str) -> float:
        """PEFT's alpha at a module."""
        return next((value for key, value in self.alphas.items() if _tail(key, path)), self.alpha)

    def scaling_of(self, path: str) -> float:
        """The factor of the update at a module: alpha/r, or alpha/sqrt(r) for rsLoRA."""
        rank = self.rank_at(path)
        return self.alpha_at(path) / (math.sqrt(rank) if self.rslora else rank)


def read_settings(values: Any) -> tuple[PeftSettings, list[str]]:
    """Check PEFT's settings; returns them with all faults (an empty list when they are good)."""
    if not isinstance(values, dict):
        return PeftSettings(), ["adapter_config.json is not a JSON object"]
    values = dict(values)
    faults = []
    if values.pop("peft_type", None) != "LORA":
        faults.append("peft_type: expected LORA")
    start = values.pop("init_lora_weights", True)
    if start not in _STARTS:
        faults.append(
            f"init_lora_weights: {start!r} changes the base's weights; convert the adapter to a "
            "plain one where it was trained"
        )
    settings = PeftSettings()
    for name, (own, read) in _READERS.items():
        if name in values:
            try:
                setattr(settings, own, read(values.pop(name)))
            except ValueError as error:
                faults.append(f"{name}: {error}")
    for name, value in values.items():
        if name in _ONLY_EMPTY:
            if value not in (None, False, {}, []):
                faults.append(f"{name}: {value!r} is not supported")
        elif name not in _ANY_VALUE:
            faults.append(f"{name}: unknown field")
    return settings, faults


def literal(pattern: str) -> tuple[str, bool]:
    """A PEFT pattern as a plain name, and whether it stands for the whole path.

    A leading ^, a trailing $ and escaped characters are understood. Errors: `ValueError` for
    anything else that only a regular expression could mean: none is ever run from a file.
    """
    whole = pattern.startswith("^")
    name = pattern.removeprefix("^").removesuffix("$")
    plain = re.sub(r"\\(\W)", r"\1", name)
    if re.search(r"[\\*+?()\[\]{}|^$]", re.sub(r"\\\W", "", name)) or not plain:
        raise ValueError(f"{pattern!r} is a regular expression, expected a plain module name")
    return plain, whole


def _tail(key: str, path: str) -> bool:
    name, whole = literal(key)
    return path == name or (not whole and path.endswith(f".{name}"))


def rank_from(value: Any) -> int:
    """A rank, of a file. Errors: `ValueError`."""
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise ValueError(f"{value!r}, expected a whole number from 1 to {MAX_RANK}")
    return value


def positive(value: Any, most: float = MAX_ALPHA) -> float:
    """A finite number above 0, of a file. Errors: `ValueError`."""
    # Held against `most` as it is: a whole number may be too large for a float.
    if type(value) not in (int, float) or not 0 < value <= most:
        raise ValueError(f"{value!r}, expected a number above 0 and at most {most:g}")
    return float(value)


def dropout_from(value: Any) -> float:
    """A share that is dropped, of a file. Errors: `ValueError`."""
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(f"{value!r}, expected a number from 0 to below 1")
    return float(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r}, expected true or false")
    return value


def _bias_name(value: Any) -> str:
    names = {theirs: ours for ours, theirs in BIAS.items()}
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{value!r}, expected one of {', '.join(names)}")
    return names[value]


def _names(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"{value!r}, expected a list of module names")
    return tuple(value)


def _ranks(value: Any) -> dict[str, int]:
    return {key: rank_from(one) for key, one in _patterns(value)}


def _alphas(value: Any) -> dict[str, float]:
    return {key: positive(alpha) for key, alpha in _patterns(value)}


def _patterns(value: Any) -> Iterable[tuple[str, Any]]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise ValueError(f"{value!r}, expected a table of module names")
    for key in value:
        literal(key)
    return value.items()


_READERS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "r": ("r", rank_from),
    "lora_alpha": ("alpha", positive),
    "lora_dropout": ("dropout", dropout_from),
    "use_rslora": ("rslora", _flag),
    "use_dora": ("dora", _flag),
    "bias": ("bias", _bias_name),
    "modules_to_save": ("modules_to_save", _names),
    "rank_pattern": ("ranks", _ranks),
    "alpha_pattern": ("alphas", _alphas),
    INDICES: ("token_rows", ids_of),
}
"""PEFT's fields: the setting of ours that each is, and how it is read."""


def number(value: float) -> float:
    """An integer where it is one, as PEFT writes alpha."""
    return int(value) if value == int(value) else value


def commonest(values: Iterable[T]) -> T:
    """The value that occurs most often."""
    return Counter(values).most_common(1)[0][0]


def anchored(path: str) -> str:
    """The pattern by which PEFT means this path alone."""
    return "^" + re.escape(path)


def patterns_for(values: Mapping[str, T], usual: T) -> dict[str, T]:
    """PEFT's patterns of the values by path that are other than usual."""
    return {anchored(path): value for path, value in values.items() if value != usual}


def targets_for(paths: list[str], modules: Iterable[str] | None) -> list[str] | str:
    """The paths as a list, which PEFT also holds against tails of names; where that would hit
    another module too, or the base's `modules` are not known, the one expression that names
    exactly these.
    """
    tails = tuple(f".{path}" for path in paths)
    if modules is None or any(path.endswith(tails) for path in modules if path not in paths):
        return "|".join(re.escape(path) for path in paths)
    return paths
