"""Pages stand alone, escape what they show, and say in words what pictures show."""

from __future__ import annotations

import pytest

from sidepath.page import canvas, figure, page, running_mean, svg, table
from tests.pages import Collector, fetched


def test_cells_and_titles_are_escaped() -> None:
    text = page("a <b>", [table(("x <y>",), [("<script>1</script>",)])])
    assert "script" not in [name for name, _ in Collector(text).tags]
    assert "<script>1</script>" in Collector(text).text
    assert "&lt;b&gt;" in text


def test_two_pictures_on_one_page_share_no_names() -> None:
    pytest.importorskip("matplotlib")
    texts = []
    for name in ("one", "two"):
        drawn = canvas(2, 2)
        drawn.subplots().plot([1, 2], [2, 1])
        texts.append(figure(svg(drawn, name), f"what {name} shows", "caption"))
    text = page("two", texts)
    names = Collector(text).values("id")
    assert len(names) == len(set(names)) > 2
    used = [str(link) for link in Collector(text).values("xlink:href")]
    assert used, "glyphs are referred to"
    assert {link.removeprefix("#") for link in used} <= set(names)
    assert fetched(text) == []
    assert Collector(text).values("aria-label") == ["what one shows", "what two shows"]


def test_running_mean_against_the_obvious_loop() -> None:
    assert running_mean([4.0, 2.0, 0.0], 2) == [4.0, 3.0, 1.0]
    assert running_mean([], 3) == []
