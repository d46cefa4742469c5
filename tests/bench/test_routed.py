"""Routed batches: the rows are those asked for, and the bound is arithmetic."""

from __future__ import annotations

import pytest
import torch

from sidepath.bench.decode import BASE, answering
from sidepath.bench.models import make, token_ids
from sidepath.bench.peers import with_ours
from sidepath.bench.routed import Routed, memory_bound
from sidepath.bench.setting import Bench
from sidepath.errors import ParityError
from sidepath.injection.surgery import activate, route

NAMES = ("first", "second")


def test_each_row_is_its_adapters(quick: Bench) -> None:
    """What the figure's check of ours against PEFT rests on: the adapters differ."""
    model = answering("llama", "float32", quick, names=NAMES)["ours"]
    ids_BT = token_ids(model, 3, 8)
    with torch.no_grad():
        with route(model, [NAMES[0], NAMES[1], NAMES[0]]):
            mixed = model(input_ids=ids_BT).logits
        for row in range(3):
            activate(model, NAMES[row % 2])
            torch.testing.assert_close(
                mixed[row], model(input_ids=ids_BT).logits[row], rtol=1e-4, atol=1e-5
            )
        activate(model, NAMES[1])
        assert not torch.allclose(mixed[0], model(input_ids=ids_BT).logits[0], atol=1e-3)


def test_the_bound_is_the_bytes_read(quick: Bench) -> None:
    model = make("llama", "bfloat16", quick.device, quick=True)
    base = sum(own.nbytes for own in model.parameters())
    with_ours(model, NAMES, as_base=True)
    factors = sum(own.nbytes for own in model.parameters()) - base
    assert memory_bound(model) == 1 + factors / base


def test_neighbours_share_an_adapter_unless_mixed() -> None:
    names = ["a", "b", "c"]
    assert Routed("float32", 6, 3).named(names, 6) == ["a", "a", "b", "b", "c", "c"]
    assert Routed("float32", 6, 3, mixed=True).named(names, 5) == ["a", "b", "c", "a", "b"]


@pytest.mark.parametrize("tokens", [16, None])
@pytest.mark.usefixtures("without_peft")
def test_without_the_peer(tokens: int | None, quick: Bench) -> None:
    found = Routed("float32", 64, 64, tokens=tokens)("x", quick)
    assert set(found.ways) - {"new block"} == {BASE, "ours"}
    assert (found.bound is None) == (tokens is not None)


def test_rows_that_answer_otherwise_are_not_timed(
    quick: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is handed the rows the wrong way round: PEFT's answers are others."""
    pytest.importorskip("peft")
    from sidepath.bench import routed

    monkeypatch.setattr(routed, "route", lambda model, rows: route(model, rows[::-1]))
    monkeypatch.setattr(routed, "QUICK_ADAPTERS", 3)
    with pytest.raises(ParityError, match="compute different things"):
        Routed("float32", 3, 3, tokens=8)("x", quick)
