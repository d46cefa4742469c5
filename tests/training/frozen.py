"""Rows, models and runs of the tests of feature-based transfer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data
from sidepath.injection.surgery import activate, put_in
from sidepath.injection.targets import resolve
from sidepath.methods.base import Method
from sidepath.methods.plain import LinearProbe
from sidepath.training.loop import train
from sidepath.training.report import StepReport
from tests.training.kit import bert, llama

CONFIG = TrainConfig(
    epochs=3, batch_size=4, accumulate=2, learning_rate=1e-2, schedule="constant", warmup=0, clip=0
)


ROWS_OF_PROOF = 2
"""The longest row and the shortest, by which a run finds out what the head reads."""


Counted = list[int]


def pairs(count: int = 22) -> list[dict[str, Any]]:
    return [{"prompt": "ab" * (at % 5) + f"{at}=", "completion": "xyz"[: at % 3 + 1]}
            for at in range(count)]  # fmt: skip


def labelled(count: int = 22) -> list[dict[str, Any]]:
    return [{"text": "ab" * (at % 7) + str(at), "label": at % 2} for at in range(count)]


def as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    """A transform that changes nothing: the run cannot know, and keeps no features."""
    return row


def adapted(model: Any, config: Method | None = None) -> Any:
    config = config or LinearProbe()
    torch.manual_seed(5)
    put_in(model, config, "a", resolve(model, config))
    activate(model, "a")
    return model


def counting(model: Any) -> Counted:
    """Filled with the number of rows each time the body's embedding is asked for a batch."""
    seen: Counted = []
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


def learnt(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "@a" in n])


def run(model: Any, data: Data, config: TrainConfig = CONFIG) -> list[StepReport]:
    return list(train(model, data, config))


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], list[dict[str, Any]]]]] = {
    "llama": (llama, pairs),
    "bert": (bert, labelled),
}
