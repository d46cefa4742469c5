"""Frozen, typed settings and the one way to read, check and print them (floor 0).

Each field is declared once, in a frozen dataclass; the string below it is its help
text, on the command line and in the documentation. A default stands there and nowhere else.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from sidepath.errors import ConfigError, guessed

T = TypeVar("T")


@dataclass(frozen=True)
class TrainConfig:
    """How an adapter is trained; the defaults suit LoRA on a small or middling base."""

    steps: int | None = None
    """Optimiser steps; together with `epochs` the smaller of the two ends the run."""
    epochs: float | None = None
    """Passes over the training rows; 3 when neither `steps` nor `epochs` is given."""
    batch_size: int = 8
    """Rows in one forward pass."""
    accumulate: int = 1
    """Forward passes in one optimiser step, which sees batch_size x accumulate rows whatever the
    number of processes; the loss is normalised by tokens over all of them."""
    packing: bool = False
    """Fill each row with several examples, up to the longest row allowed; none sees another."""
    workers: int = 0
    """Processes that make batches ahead; worth it only for data with a transform of their own."""
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW; or on a GPU bitsandbytes' AdamW, its state in 8 bits and paged out when memory is
    short."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW; LoRA wants about ten times that of full fine-tuning."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup: float = 0.06
    """Share of the steps over which the learning rate rises linearly from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.999
    """AdamW's decay of the second moment."""
    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    seed: int = 0
    """Seed of the data order, of dropout and of the adapter's start."""
    autocast: Literal["off", "bfloat16"] = "off"
    """Run the forward pass under autocast in this dtype."""
    kernels: Literal["fused", "plain"] = "fused"
    """Compute layers with side paths, known blocks and the loss in one piece each (faster, less
    memory, equal up to rounding), or everything as written."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass to save memory."""
    eval_share: float = 0.0
    """Share of the training rows held out when no evaluation data are given."""
    eval_every: int = 0
    """Steps between evaluations on held-out rows; 0 evaluates at the end only."""
    patience: int = 0
    """Evaluations without improvement before stopping early; 0 never stops early."""
    checkpoint_every: int = 0
    """Steps between checkpoints to resume from; 0 writes none."""
    keep_checkpoints: int = 2
    """Checkpoints kept on disk; older ones go once a new one is safe."""
    label_smoothing: float = 0.0
    """Share of each target's probability spread evenly over the vocabulary or classes."""
    watch: int = 0
    """Steps between looks at each layer's effective rank, norm of B and gradient norm, which are
    saved with the adapter beside the loss of every step; 0 keeps none."""

    def __post_init__(self) -> None:
        check(self)
        rules = {
            "steps": self.steps is None or self.steps >= 1,
            "epochs": self.epochs is None or self.epochs > 0,
            "batch_size": self.batch_size >= 1,
            "accumulate": self.accumulate >= 1,
            "workers": self.workers >= 0,
            "learning_rate": self.learning_rate > 0,
            "warmup": 0 <= self.warmup <= 1,
            "weight_decay": self.weight_decay >= 0,
            "beta1": 0 <= self.beta1 < 1,
            "beta2": 0 <= self.beta2 < 1,
            "clip": self.clip >= 0,
            "eval_share": 0 <= self.eval_share < 1,
            "eval_every": self.eval_every >= 0,
            "patience": self.patience >= 0,
            "checkpoint_every": self.checkpoint_every >= 0,
            "keep_checkpoints": self.keep_checkpoints >= 1,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "watch": self.watch >= 0,
        }
        require(self, rules)


def require(config: Any, rules: Mapping[str, bool]) -> None:
    """Raise one `ConfigError` that names every field whose rule is False."""
    broken = [name for name, holds in rules.items() if not holds]
    if broken:
        docs = field_docs(type(config))
        raise ConfigError(
            f"{type(config).__name__}: impossible value for {', '.join(broken)}",
            faults=[f"{name} = {getattr(config, name)!r}: {docs.get(name, '')}" for name in broken],
        )


def check(config: Any) -> None:
    """Check every field of a dataclass instance against its annotation; all faults at once."""
    hints = field_types(type(config))
    faults = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, hints[field.name]):
            expected = f"{field.name} = {value!r}: expected {type_name(hints[field.name])}"
            faults.append(guessed(expected, str(value), _texts(hints[field.name])))
    if faults:
        raise ConfigError(f"{type(config).__name__}: wrong type or value", faults=faults)


def _texts(hint: Any) -> list[str]:
    """The texts among which a value is one of; none for other kinds."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    return [choice for choice in choices if isinstance(choice, str)]


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, args[0]) and _fits(item, args[1]) for key, item in value.items()
        )
    if hint is float:
        return _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def _is_number(value: Any) -> bool:
    # Compared as it is: a whole number may be too large for a float.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def type_name(hint: Any) -> str:
    """A type as a user reads it: `int`, `one of none, all, lora`, `list of str`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("nothing" if arg is type(None) else type_name(arg) for arg in args)
    if origin is tuple:
        return f"list of {type_name(args[0])}"
    if origin is not None:
        return f"table of {type_name(args[1])}"
    return "finite number" if hint is float else str(hint.__name__)


def field_types(cls: type) -> Mapping[str, Any]:
    """The resolved annotation of each field of a dataclass."""
    if cls not in _resolved:  # annotations are texts: resolving them takes longer than checking
        hints = typing.get_type_hints(cls)
        _resolved[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return _resolved[cls]


_resolved: dict[type, Mapping[str, Any]] = {}


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass (and of its dataclass parents)."""
    docs: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(parent):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                docs[node.target.id] = " ".join(after.value.value.split())
    return docs


def build(cls: type[T], values: Mapping[str, Any], *, where: object = None) -> T:
    """Build a config dataclass from plain values (lists become tuples; one text, a tuple of one).

    Unknown keys raise a `ConfigError` that names the nearest known ones.
    """
    hints = field_types(cls)
    unknown = [key for key in values if key not in hints]
    if unknown:
        faults = [guessed(f'"{key}"', key, hints) for key in unknown]
        raise ConfigError(f"{cls.__name__}: unknown field", where=where, faults=faults)
    return cls(**{key: _plain(value, hints[key]) for key, value in values.items()})


def _plain(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, Mapping):
        return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    if isinstance(value, str) and hint == tuple[str, ...]:
        return (value,)
    return float(value) if hint in (float, float | None) and _is_number(value) else value


def as_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain values that JSON and TOML hold (tuples become lists)."""
    return {
        field.name: _jsonable(getattr(config, field.name)) for field in dataclasses.fields(config)
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return value
