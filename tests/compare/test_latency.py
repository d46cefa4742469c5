"""Latency beside the base: what can be merged is merged, and then costs no operator."""

from __future__ import annotations

from pathlib import Path

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


def test_what_only_training_needs_is_not_timed() -> None:
    """A prefix is made by a network while it is trained, and answers without it."""
    made, plain = entrants(
        {"name": "prefix", "tokens": 3, "hidden": 8},
        {"name": "prefix", "label": "plain", "tokens": 3, "hidden": None},
    )
    one, other = (
        latencies(setting(), given, [Shape(2, 8)], rounds=1)[0] for given in (made, plain)
    )
    assert one.form == "apart"
    assert one.operators == other.operators > one.base_operators


def test_a_head_that_no_checkpoint_filled_is_the_same_on_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text(
        "\n".join(["text\tlabel", *(f"film {at}\t{at % 2}" for at in range(12))]) + "\n"
    )
    given = setting(data=str(path), eval_data=str(path), metric=None)
    (lora,) = entrants({"name": "lora", "r": 2})
    assert latencies(given, lora, [Shape(1, 8)], rounds=1)[0].form == "merged"


def test_shapes() -> None:
    assert shapes_of(("1x128", "32x512")) == [Shape(1, 128), Shape(32, 512)]
    with pytest.raises(ConfigError) as error:
        shapes_of(("1x0", "a", "3x4", "2*5"))
    assert [fault.partition(":")[0] for fault in error.value.faults] == ['"1x0"', '"a"', '"2*5"']
