"""What a page of ours holds, read as a browser would."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Collector(HTMLParser):
    """Tags, their attributes, and the visible text of a page."""

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str | None]:
        """Every value of an attribute."""
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def fetched(text: str) -> list[str]:
    """Everything by which a page could ask for something outside of itself."""
    page = Collector(text)
    links = [str(value) for name in ("src", "href", "xlink:href") for value in page.values(name)]
    outside = [link for link in links if not link.startswith(("#", "data:image/png;"))]
    scripts = [name for name, _ in page.tags if name in ("script", "link", "iframe", "object")]
    return outside + scripts + re.findall(r"@import|url\((?!#)", text)
