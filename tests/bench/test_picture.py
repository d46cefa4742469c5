"""The picture: what stands where, and that something is drawn."""

from __future__ import annotations

import dataclasses
import io

import pytest

from sidepath.bench.figure import Figure, at_most, figure_of
from sidepath.bench.picture import STYLES, panels, picture
from sidepath.bench.timing import Spread

pytest.importorskip("matplotlib")


def test_times_with_a_reference_stand_over_it(figures: list[Figure]) -> None:
    found = panels(figures[::-1])
    assert list(found) == ["times the reference: floor, base or copy", "MiB", "ms"]
    ((name, points, target),) = found["times the reference: floor, base or copy"]
    assert (name, target) == ("step-x", 0.95)
    assert set(points) == {"ours", "PEFT"}
    assert points["ours"].median == 1.0


def test_a_target_over_another_way_becomes_a_value(figures: list[Figure]) -> None:
    ((_, points, target),) = panels(figures)["MiB"]
    assert points == {way: Spread(v, v, v) for way, v in (("floor", 1), ("ours", 2), ("PEFT", 8))}
    assert target == pytest.approx(0.27 * 8)


def test_a_target_of_ours_alone_is_in_the_axis_unit(figures: list[Figure]) -> None:
    ((_, points, target),) = panels(figures)["ms"]
    assert points["ours"].median == pytest.approx(20)
    assert target == pytest.approx(20)


def test_a_target_without_its_way_is_not_drawn(figures: list[Figure]) -> None:
    alone = figure_of("x", "x", {"ours": [1.0]}, {"ours / PEFT": at_most(0.3)}, unit="bytes")
    ((_, _, target),) = panels([alone])["MiB"]
    assert target is None


def test_the_picture_is_made_and_not_empty(figures: list[Figure]) -> None:
    """Pixels of ours', the peer's and the target's colour are on it."""
    from matplotlib import image

    png = picture(figures, "a machine", "png")
    pixels = image.imread(io.BytesIO(png))
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 800
    for colour in (*(style[0] for style in STYLES.values()), "#0b6e4f"):
        wanted = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        assert (abs(pixels[..., :3] - wanted).max(axis=-1) < 0.01).sum() > 20


def test_the_same_figures_make_the_same_picture_and_others_another(figures: list[Figure]) -> None:
    one, other = (picture(figures, "a machine", "svg") for _ in range(2))
    assert one == other
    assert b"<svg" in one
    renamed = [dataclasses.replace(figures[0], name="another"), *figures[1:]]
    assert picture(renamed, "a machine", "svg") != one
