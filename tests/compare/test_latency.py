"""Latency beside the base: what can be merged is merged, and then costs no operator."""

from __future__ import annotations

import pytest

from sidepath.compare.latency import Shape, latencies, shapes_of
from sidepath.errors import ConfigError

from .kit import entrants, setting


def test_merged_lora_has_the_bases_operators_and_others_are_measured_apart() -> None:
    lora, top = entrants({"name": "lora", "r": 2}, {"name": "full", "label": "top", "top": 1})
    shapes = [Shape(2, 8), Shape(1, 9999)]
    one, cut = latencies(setting(), lora, shapes, rounds=3)
    assert (one.form, one.shape, cut.shape) == ("merged", "2x8", "1x160")
    assert one.operators == one.base_operators > 50
    assert one.seconds.min > 0
    assert one.ratio.min <= one.ratio.median <= one.ratio.max
    found = latencies(setting(), top, shapes[:1], rounds=1)[0]
    assert (found.form, found.operators) == ("merged", one.base_operators)


def test_what_cannot_be_merged_is_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from sidepath.compare import latency
    from sidepath.errors import MergeError

    def refuse(*_: object) -> None:
        raise MergeError("it has layers of its own")

    monkeypatch.setattr(latency, "merge", refuse)
    found = latencies(setting(), entrants()[0], [Shape(2, 8)], rounds=1)[0]
    assert found.form == "apart"
    assert found.operators > found.base_operators


def test_shapes() -> None:
    assert shapes_of(("1x128", "32x512")) == [Shape(1, 128), Shape(32, 512)]
    with pytest.raises(ConfigError) as error:
        shapes_of(("1x0", "a", "3x4", "2*5"))
    assert [fault.partition(":")[0] for fault in error.value.faults] == ['"1x0"', '"a"', '"2*5"']
