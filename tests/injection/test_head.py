"""The head's loss in chunks: where it is used, where not, and that both are one loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidepath.data.example import Example
from sidepath.injection import head as head_module
from sidepath.injection.head import BODIES, frozen_body, fused_head
from sidepath.injection.merging import merge
from sidepath.injection.registry import require_registry
from sidepath.injection.surgery import remove, route
from sidepath.kernels.head import head_loss
from sidepath.training.batching import Batch, collate, collate_packed
from sidepath.training.loss import batch_loss
from tests.conftest import tiny_llama
from tests.core.kit import FAMILIES, put, tiny

LENGTHS = (5, 9, 3, 12)


def examples() -> list[Example]:
    """Rows of several lengths whose first two tokens are the prompt."""
    import numpy as np

    draw = np.random.default_rng(0)
    return [
        Example(draw.integers(3, 64, length).astype(np.int32), np.arange(length) > 1, line=at)
        for at, length in enumerate(LENGTHS)
    ]


def padded() -> Batch:
    return collate(examples(), range(4), 0)


def packed() -> Batch:
    own = examples()
    return collate_packed([own[:2], own[2:]], range(4), 0)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_loss(monkeypatch: pytest.MonkeyPatch, model: nn.Module, *args: Any, **kw: Any) -> Tensor:
    """The loss through the model's own logits; all else stays fused."""
    with monkeypatch.context() as patch:
        patch.setattr("sidepath.training.loss.fused_head", lambda model: None)
        return batch_loss(model, *args, **kw)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("batch", [padded, packed])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_models_own(
    family: str, batch: Callable[[], Batch], smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = put(tiny(family).double(), dtype="base")
    assert fused_head(model) is not None
    found = batch_loss(model, batch(), smoothing=smoothing)
    expected = plain_loss(monkeypatch, model, batch(), smoothing=smoothing)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(model, found), gradients(model, expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = put(tiny(family).bfloat16())
    found = batch_loss(model, padded())
    assert found.dtype == torch.float32
    expected = plain_loss(monkeypatch, model, padded())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_the_table_names_classes_that_are_there() -> None:
    for name, body in BODIES.items():
        path, _, cls = name.rpartition(".")
        found = getattr(__import__(path, fromlist=[cls]), cls)
        assert found.base_model_prefix == body


def test_a_batch_without_targets_has_no_loss() -> None:
    model = put(tiny())
    own = [Example(e.ids_T, e.supervised_T & False, line=e.line) for e in examples()]
    loss = batch_loss(model, collate(own, range(4), 0))
    assert loss.item() == 0
    assert all(not grad.any() for grad in gradients(model, loss).values())


def test_the_logits_are_those_of_targets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is asked for rows that are followed by a target, and never for logits of all."""
    seen: list[torch.Size] = []

    def watched(hidden_ND: Tensor, *args: Any, **kw: Any) -> Tensor:
        seen.append(hidden_ND.shape)
        return head_loss(hidden_ND, *args, **kw)

    monkeypatch.setattr(head_module, "head_loss", watched)
    model = put(tiny())
    batch_loss(model, padded())
    assert seen == [(sum(LENGTHS) - 2 * len(LENGTHS), 32)]


def hooked(model: nn.Module, path: str, kind: str) -> nn.Module:
    getattr(model.get_submodule(path), f"register_{kind}_hook")(lambda *args: None)
    return model


def on_fresh(path: str, kind: str) -> nn.Module:
    return hooked(put(tiny()), path, kind)


def shadowed(path: str) -> Any:
    model = put(tiny())
    module = model.get_submodule(path)
    own = module.forward
    module.forward = lambda *args, **kw: own(*args, **kw)
    return model


def thawed() -> Any:
    model = put(tiny())
    model.lm_head.weight.requires_grad_()
    return model


def exchanged() -> Any:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = put(tiny())
    model.lm_head.__class__ = Scaled
    return model


def off() -> Any:
    model = put(tiny())
    require_registry(model).routing.fused = False
    return model


def inherited() -> Any:
    model = tiny()
    model.__class__ = type("Own", (type(model),), {"__module__": __name__})
    return put(model)


def removed() -> Any:
    model = put(tiny())
    remove(model, "x")
    return model


REFUSED: dict[str, Callable[[], Any]] = {
    "no adapter": tiny,
    "removed": removed,
    "head adapted": lambda: put(tiny(), targets=("lm_head", "q_proj")),
    "head trained whole": lambda: put(tiny(), train_whole=("lm_head",)),
    "head thawed": thawed,
    "head of another class": exchanged,
    "model of another class": inherited,
    "fused off": off,
    "forward shadowed": lambda: shadowed(""),
    "head's forward shadowed": lambda: shadowed("lm_head"),
    **{
        f"{kind} hook on {path or 'model'}": partial(on_fresh, path, kind)
        for path in ("", "lm_head")
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_it_is_not_used(case: str) -> None:
    assert fused_head(REFUSED[case]()) is None


def test_not_while_somebody_waits_for_every_modules_call() -> None:
    model = put(tiny())
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert fused_head(model) is None
    finally:
        handle.remove()
    assert fused_head(model) is not None


def test_not_under_autocast_and_again_after_it() -> None:
    model = put(tiny())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_head(model) is None
    assert fused_head(model) is not None


def test_hooks_of_the_body_are_called() -> None:
    model, seen = put(tiny()), []
    model.model.register_forward_hook(lambda *args: seen.append("body"))
    model.model.norm.register_forward_hook(lambda *args: seen.append("norm"))
    assert fused_head(model) is not None
    batch_loss(model, padded())
    assert seen == ["norm", "body"]


@pytest.mark.parametrize("tied", [False, True])
def test_tied_heads_merged_models_and_routed_rows(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = put(put(tiny_llama(tied=tied), "y"), "x")
    assert fused_head(model) is not None
    with route(model, ["x", None, "y", "x"]):
        found = batch_loss(model, padded())
        expected = plain_loss(monkeypatch, model, padded())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        gradients(model, found), gradients(model, expected), atol=1e-4, rtol=1e-3
    )
    merge(model, "x")
    torch.testing.assert_close(
        batch_loss(model, padded()), plain_loss(monkeypatch, model, padded())
    )


@pytest.mark.parametrize(
    ("places", "above"),
    [
        (["lm_head"], True),
        (["lm_head", "models.other"], True),  # no part of "model", though its name begins alike
        ([], True),
        (["model"], False),
        (["lm_head", "model.layers.1.mlp.up_proj"], False),
    ],
)
def test_a_body_is_frozen_if_nothing_is_trained_in_it(places: list[str], above: bool) -> None:
    model = tiny_llama()
    assert frozen_body(model, places) is (model.model if above else None)


def test_what_has_no_one_body_has_no_frozen_one() -> None:
    assert frozen_body(nn.Linear(2, 2), []) is None
