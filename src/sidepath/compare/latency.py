"""Inference beside the base alone: merged where the method can be merged, else apart.

The two models are taken in turn, forward pass by forward pass, and operator calls are counted
beside the times: what a machine's noise hides, the count shows.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.bench.counted import operator_calls
from sidepath.bench.timing import Action, Clock, Spread, interleaved, quotients
from sidepath.compare.entrants import Entrant
from sidepath.compare.material import material_of
from sidepath.compare.setting import Setting
from sidepath.compare.trial import NAME, base_for, fresh
from sidepath.errors import ConfigError, MergeError
from sidepath.injection.merging import merge
from sidepath.store.adapter import load
from sidepath.training.trained import device_of


@dataclass(frozen=True)
class Shape:
    """A batch: rows and tokens a row."""

    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}"


def shapes_of(texts: tuple[str, ...]) -> list[Shape]:
    """Shapes written ROWSxTOKENS. Raises `ConfigError` naming every text that is none."""
    found, faults = [], []
    for text in texts:
        rows, _, tokens = text.partition("x")
        if rows.isdecimal() and tokens.isdecimal() and int(rows) and int(tokens):
            found.append(Shape(int(rows), int(tokens)))
        else:
            faults.append(f'"{text}": expected ROWSxTOKENS, as in 1x128')
    if faults:
        raise ConfigError("latency: not a shape", faults=faults)
    return found


@dataclass(frozen=True)
class Latency:
    """One forward pass of an entrant beside the base's, at one shape."""

    shape: str
    form: str
    """`merged`, or `apart` where the method cannot be merged into this base."""
    base_seconds: Spread
    seconds: Spread
    ratio: Spread
    """Of neighbouring runs."""
    base_operators: int
    operators: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def latencies(
    setting: Setting, entrant: Entrant, shapes: Sequence[Shape], *, rounds: int
) -> list[Latency]:
    """Measure an entrant, untrained, at each shape: what was learned costs no time.

    Shapes longer than the base's context are cut to it. Holds two bases in memory.
    Raises what `inject`, `save` and `load` raise.
    """
    adapted = _as_loaded(setting, entrant)
    base = _base(setting)
    form = _folded(adapted)
    context = setting.bases.context()
    return [
        _measured(
            base, adapted, form, Shape(one.rows, min(one.tokens, context or one.tokens)), rounds
        )
        for one in shapes
    ]


def _base(setting: Setting) -> nn.Module:
    torch.manual_seed(0)  # as `fresh` draws the heads that no checkpoint filled
    return base_for(setting, material_of(setting))[0]


def _as_loaded(setting: Setting, entrant: Entrant) -> nn.Module:
    """The entrant as its saved folder gives it back: without what only training needs, such as
    the network that makes a prefix.
    """
    with TemporaryDirectory() as place:
        folder = fresh(setting, entrant, 0).save(Path(place) / NAME)
        gc.collect()  # the base it was saved from is one big cycle
        model = _base(setting)
        load(model, folder, NAME)
    return model


def _folded(model: nn.Module) -> str:
    try:
        merge(model, NAME)
    except MergeError:
        return "apart"
    return "merged"


def _measured(base: nn.Module, adapted: nn.Module, form: str, shape: Shape, rounds: int) -> Latency:
    config: Any = base.config
    vocabulary = int(config.get_text_config().vocab_size)
    ids_BT = torch.randint(3, vocabulary, (shape.rows, shape.tokens), device=device_of(base))
    actions = {"base": _forward(base, ids_BT), "entrant": _forward(adapted, ids_BT)}
    calls = {name: operator_calls(action) for name, action in actions.items()}
    seconds = interleaved(actions, rounds=rounds, clock=Clock(ids_BT.device))
    return Latency(
        str(shape),
        form,
        Spread.of(seconds["base"]),
        Spread.of(seconds["entrant"]),
        quotients(seconds["entrant"], seconds["base"]),
        calls["base"],
        calls["entrant"],
    )


def _forward(model: nn.Module, ids_BT: Tensor) -> Action:
    """One forward pass without gradients, every row full."""
    mask_BT = torch.ones_like(ids_BT)
    model.eval()

    @torch.no_grad()
    def run() -> object:
        return model(input_ids=ids_BT, attention_mask=mask_BT)

    return run
