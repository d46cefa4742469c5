"""The report of inspect in a real browser: at two widths, by day, by night, and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidepath.cli import main
from tests.browser import CONTRAST, launched, look, overflow, watched
from tests.cli.watched import watch
from tests.pages import Collector

WIDTHS = {"wide": 1280, "narrow": 390}
PAPER = {"width": 680, "height": 960}
"""A4 in CSS pixels, less margins of 15 mm."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(
    tiny_base: Path, pairs: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A page with every section of one adapter, and one of two adapters."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("pages")
    one = watch(tiny_base, pairs, folder)
    pages = {name: folder / f"{name}.html" for name in ("one", "two")}
    words = ["--base", tiny_base, "--merged", one.merged, "--html", pages["one"]]
    more = ["--data", pairs, "--advise", "--tolerance", 0.2]
    assert main(["inspect", *map(str, [one.adapter, *words, *more])]) == 0
    assert main(["inspect", *map(str, [one.adapter, trained, "--html", pages["two"]])]) == 0
    return pages


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one", "two"])
def test_the_report_in_a_browser(
    browser: Any, reports: dict[str, Path], name: str, width: str, scheme: str
) -> None:
    path = reports[name]
    size = {"width": WIDTHS[width], "height": 900}
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page = context.new_page()
    said, asked = watched(page)
    page.goto(path.as_uri())
    look(page, f"{path.stem}-{name}-{width}-{scheme}")
    assert said == [], "nothing on the console"
    assert asked == [path.as_uri()], "nothing is fetched but the page"
    assert overflow(page) == 0
    assert page.evaluate(CONTRAST) == []
    _require_pictures(page, path)
    page.emulate_media(media="print")
    page.set_viewport_size(PAPER)
    assert overflow(page) == 0
    assert page.evaluate(CONTRAST) == []
    context.close()


def _require_pictures(page: Any, path: Path) -> None:
    """Each picture is seen, and has a name of its own for those who do not see it."""
    pictures = page.get_by_role("img").all()
    names = [picture.get_attribute("aria-label") for picture in pictures]
    drawn = [name for name, _ in Collector(path.read_text()).tags if name == "svg"]
    assert len(pictures) == len(drawn) > 0
    assert all(names)
    assert len(set(names)) == len(names)
    for picture in pictures:
        box = picture.bounding_box()
        assert box["width"] > 100
        assert box["height"] > 100


def test_a_page_that_is_too_wide_fetches_or_is_faint_would_be_seen(
    browser: Any, tmp_path: Path
) -> None:
    """The measures above can fail."""
    path = tmp_path / "bad.html"
    path.write_text(
        '<p style="color: #999; background: #fff">faint</p><img src="none.png">'
        '<div style="width: 3000px">wide</div><script>nothing()</script>'
    )
    page = browser.new_page()
    said, asked = watched(page)
    page.goto(path.as_uri())
    assert len(said) == 2
    assert len(asked) == 2
    assert overflow(page) > 1000
    assert [tag for tag, *_ in page.evaluate(CONTRAST)] == ["P"]
    page.close()
