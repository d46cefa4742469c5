"""One HTML file that opens without a network: the frame, tables and pictures of every report.

Nothing is fetched and nothing runs: no script, no font, no image beside the file.
"""

from __future__ import annotations

import html
import importlib.util
import io
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #ffffff; --soft: #5c5c66;
        --line: #d8d8de; --tint: #f4f4f7; --good: #0b6e4f; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --paper: #17171a; --soft: #a5a5b0;
        --line: #3a3a42; --tint: #222227; --good: #63d2a6; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin-top: 2.4rem }
p.lead { color: var(--soft); margin-top: 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .93rem }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
         vertical-align: top } th:first-child, td:first-child, td.text, th.text { text-align: left }
thead th { border-bottom: 2px solid var(--line); font-weight: 600 }
td.text { font-family: ui-monospace, monospace; font-size: .84rem; white-space: pre-wrap;
          overflow-wrap: anywhere; min-width: 9rem }
figure { margin: 1rem 0; background: #fff; border: 1px solid var(--line); border-radius: 6px;
         padding: .5rem; overflow-x: auto }
figure svg { width: 100%; min-width: 36rem; height: auto; display: block }
figcaption { color: #444; font-size: .88rem; padding: .3rem }
details { margin: .8rem 0 } summary { cursor: pointer; color: var(--soft) }
code, pre { font-family: ui-monospace, monospace; font-size: .86rem }
pre { background: var(--tint); padding: .8rem; overflow-x: auto; border-radius: 6px }
@media print { body { max-width: none; padding: 0 } .scroll, figure { overflow: visible }
        figure svg { min-width: 0 } table { font-size: .72rem }
        th, td { padding: .2rem .3rem; overflow-wrap: anywhere } td.text { min-width: 0 }
        figure, tr { break-inside: avoid } h2 { break-after: avoid } }
"""
PICTURE_MISSING = "no picture: pip install 'sidepath[report]'"
"""In a terminal; on a page:"""
PICTURES_MISSING = "Pictures need matplotlib: pip install 'sidepath[report]'."
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, told apart with every kind of colour vision, and without colour by lightness."""
LINES = ("-", "--", ":", "-.")
"""For lines beyond the colours."""


def page(title: str, body: Sequence[str]) -> str:
    """The whole file; `title` is escaped, `body` holds ready HTML."""
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    name = f"<title>{html.escape(title)}</title>"
    head = f'<meta charset="utf-8">{view}{name}<style>{STYLE}</style>'
    text = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{text}\n</body></html>\n'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    """A table; cells are escaped, columns listed in `text` hold running text."""
    css = dict.fromkeys(text, ' class="text"')
    heads = "".join(
        f"<th{css.get(at, '')}>{html.escape(name)}</th>" for at, name in enumerate(head)
    )
    lines = [
        "".join(f"<td{css.get(at, '')}>{html.escape(cell)}</td>" for at, cell in enumerate(row))
        for row in rows
    ]
    cells = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{cells}</tbody></table></div>"
    )


def figure(picture: str, described: str, caption: str) -> str:
    """A picture (SVG) with what it shows for those who do not see it, and a line below."""
    label = html.escape(described, quote=True)
    named = picture.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure>{named}<figcaption>{html.escape(caption)}</figcaption></figure>"


def drawn(draw: Callable[[], str], described: str, caption: str) -> list[str]:
    """`figure` of what `draw` gives (SVG); without matplotlib, how to get it."""
    if not has_matplotlib():
        return [f"<p>{PICTURES_MISSING}</p>"]
    return [figure(draw(), described, caption)]


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def canvas(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, drawn without any display."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg(made: Any, name: str) -> str:
    """A figure as an SVG element. `name` keeps its inner names apart from other pictures'."""
    buffer = io.StringIO()
    made.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value with up to `window - 1` before it: what is drawn of a noisy curve."""
    sums = list(itertools.accumulate(values, initial=0.0))
    spans = ((max(0, at + 1 - window), at + 1) for at in range(len(values)))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]
