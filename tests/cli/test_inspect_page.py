"""The report of inspect in a real browser: at two widths, by day, by night, and on paper.

Needs Chromium (Debian: `apt-get install chromium`) and playwright, which drives it. With
SIDEPATH_SCREENSHOTS set to a folder the pictures of the pages are left there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidepath.cli import main
from tests.cli.watched import watch
from tests.pages import Collector

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
)
WIDTHS = {"wide": 1280, "narrow": 390}
PAPER = {"width": 680, "height": 960}
"""A4 in CSS pixels, less margins of 15 mm."""
CONTRAST = """() => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => {
      v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color; }
    return 'rgb(255, 255, 255)'; };
  const faint = [];
  for (const node of document.querySelectorAll('h1, h2, p, th, td, summary, figcaption')) {
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push([node.tagName, node.textContent.slice(0, 30), ratio]); }
  return faint; }"""
"""Texts whose contrast is below 4.5, the least that WCAG 2.2 asks for (1.4.3)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright drives the browser: pip install playwright"
    )
    with playwright.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=found, args=QUIET.split())
        yield opened
        opened.close()


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
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    _look(page, path, f"{name}-{width}-{scheme}")
    assert said == [], "nothing on the console"
    assert asked == [path.as_uri()], "nothing is fetched but the page"
    assert _overflow(page) == 0
    assert page.evaluate(CONTRAST) == []
    _require_pictures(page, path)
    page.emulate_media(media="print")
    page.set_viewport_size(PAPER)
    assert _overflow(page) == 0
    assert page.evaluate(CONTRAST) == []
    context.close()


def _overflow(page: Any) -> int:
    """By how many pixels the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - innerWidth"))


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


def _look(page: Any, path: Path, name: str) -> None:
    folder = os.environ.get("SIDEPATH_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{path.stem}-{name}.png", full_page=True)


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
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    assert len(said) == 2
    assert len(asked) == 2
    assert _overflow(page) > 1000
    assert [tag for tag, *_ in page.evaluate(CONTRAST)] == ["P"]
    page.close()
