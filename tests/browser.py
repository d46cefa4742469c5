"""A real browser for the pages that people see.

Needs Chromium (Debian: `apt-get install chromium`) and playwright, which drives it. With
SIDEPATH_SCREENSHOTS set to a folder the pictures of the pages are left there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
)
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
  const texts = 'h1, h2, p, th, td, dt, dd, label, pre, button, summary, figcaption';
  const faint = [];
  for (const node of document.querySelectorAll(texts)) {
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push([node.tagName, node.textContent.slice(0, 30), ratio]); }
  return faint; }"""
"""Texts whose contrast is below 4.5, the least that WCAG 2.2 asks for (1.4.3)."""


@contextmanager
def launched() -> Iterator[Any]:
    """Chromium; the test is skipped, with the reason, where there is none."""
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


def watched(page: Any) -> tuple[list[str], list[str]]:
    """What a page will say on its console, errors too, and the addresses it will ask for."""
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    return said, asked


def overflow(page: Any) -> int:
    """By how many pixels the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - innerWidth"))


def look(page: Any, name: str) -> None:
    """Leave a picture of the page, if somebody wants to look at it."""
    folder = os.environ.get("SIDEPATH_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)
