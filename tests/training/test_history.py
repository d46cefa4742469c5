"""`history.json`: read as it was written, and every fault of a bad one named at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepath.errors import DamagedAdapter, StoreError
from sidepath.training import history as module
from sidepath.training.history import History, LayerHistory, read_history

GOOD = History(
    every=2,
    loss=(3.0, 2.5, 2.0, 1.5),
    held_out=((2, 2.75), (4, 2.0)),
    steps=(2, 4),
    layers=(
        LayerHistory("h.0.q", (1.5, 2.0), (0.1, None), (0.3, 0.25)),
        LayerHistory("h.0.norm", None, None, (0.1, 0.2)),
    ),
)


def written(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_history(written(tmp_path / "h", GOOD.as_json())) == GOOD
    empty = History(1, (), (), (), ())
    assert read_history(written(tmp_path / "h", empty.as_json())) == empty


def _with(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(GOOD.as_json())
    change(values)
    return values


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("{", "not JSON"),
        ('{"a": 1, "a": 2}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([], "expected an object"),
        (_with(lambda v: v.pop("loss")), "expected an object"),
        (_with(lambda v: v.update(more=1)), "expected an object"),
        (_with(lambda v: v.update(format=2)), "format 2"),
        (_with(lambda v: v.update(every=0)), "every: 0"),
        (_with(lambda v: v.update(every=True)), "every: True"),
        (_with(lambda v: v["loss"].append(float("nan"))), "loss: expected a finite"),
        (_with(lambda v: v.update(loss="abc")), "loss: expected a finite"),
        (_with(lambda v: v.update(loss=[10**400])), "loss: expected a finite"),
        (_with(lambda v: v.update(steps=[4, 2])), "rising numbers from 1 to 4"),
        (_with(lambda v: v.update(steps=[2, 5])), "rising numbers from 1 to 4"),
        (_with(lambda v: v.update(steps=[0, 2])), "rising numbers from 1 to 4"),
        (_with(lambda v: v.update(held_out=[[1]])), "held_out: expected pairs"),
        (_with(lambda v: v.update(held_out=[[9, 1.0]])), "held_out: expected pairs"),
        (_with(lambda v: v.update(layers={})), "layers: expected a list"),
        (_with(lambda v: v.update(layers=[3])), "layers: expected objects"),
        (_with(lambda v: v["layers"][0].update(name=3)), "name 3"),
        (_with(lambda v: v["layers"].append(v["layers"][0])), "a name stands twice"),
        (_with(lambda v: v["layers"][0]["b_norm"].pop()), "h.0.q: b_norm: expected 2"),
        (_with(lambda v: v["layers"][0].update(effective_rank=["x", 1])), "effective_rank"),
        (_with(lambda v: v["layers"][0].update(effective_rank=[-1, 1])), "none below 0"),
        (_with(lambda v: v["layers"][1].update(gradient_norm=None)), "gradient_norm"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, values: Any, said: str) -> None:
    path = written(tmp_path / "history.json", values)
    with pytest.raises(DamagedAdapter) as caught:
        read_history(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_all_faults_at_once_and_not_too_many(tmp_path: Path) -> None:
    bad = _with(
        lambda v: v.update(every=0, layers=[dict(v["layers"][0], b_norm=3, name=f"{at}")
                                            for at in range(50)])
    )  # fmt: skip
    with pytest.raises(DamagedAdapter) as caught:
        read_history(written(tmp_path / "h", bad))
    assert len(caught.value.faults) == 51
    assert "every" in caught.value.faults[0]
    assert str(caught.value).endswith("and 31 more"), "what is shown, not what an error holds"


def test_a_file_that_is_missing_or_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="cannot read"):
        read_history(tmp_path / "none")
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(StoreError, match="too large"):
        read_history(written(tmp_path / "h", GOOD.as_json()))


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_is_read_or_refused(data: st.DataObject, tmp_path_factory: Any) -> None:
    """Bytes changed, dropped or put in: one `SidepathError`, or a history that holds together."""
    text = bytearray(GOOD.as_json().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(bytes(text))
    try:
        found = read_history(path)
    except (DamagedAdapter, StoreError):
        return
    assert all(step <= len(found.loss) for step in found.steps)
    assert all(len(layer.gradient_norm) == len(found.steps) for layer in found.layers)
