"""The report's part on the run: losses, layers over the steps, audit, plan, parity."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sidepath.analyse import run_pictures
from sidepath.page import drawn, table
from sidepath.store.plan import readable

History = Mapping[str, Any]
WATCHED = (
    ("effective_rank", "Effective rank of ΔW", "effective rank"),
    ("b_norm", "‖B‖ (Frobenius norm)", "norm of B"),
    ("gradient_norm", "‖gradient‖ (nats per unit of weight)", "gradient norm"),
)
"""Of each figure: its name, its axis, and what it is called in a sentence."""
LITTLE = 0.02
"""A change by no larger share is none."""


def trained(history: History) -> list[str]:
    """The losses, and the layers over the watched steps."""
    body = []
    if history["loss"]:
        body += [
            f"<h2>The loss {_moved(*_ends(history))}</h2>",
            f"<p>{html.escape(said_of_losses(history))}</p>",
            *drawn(
                lambda: run_pictures.losses(history),
                "Loss of each training step, and of the held-out rows where they were measured",
                "Cross-entropy in nats per supervised token (or row).",
            ),
        ]
    for figure, axis, name in WATCHED if history["steps"] else ():
        if run_pictures.lines_of(history, figure):
            body += _over_steps(history, figure, axis, name)
    return body


def _over_steps(history: History, figure: str, axis: str, name: str) -> list[str]:
    def picture() -> str:
        return run_pictures.over_steps(history, figure, axis)

    described = f"{axis} over the steps, a line for each kind of matrix"
    caption = f"{axis}: the median over blocks, and their range, for each kind of matrix."
    return [
        f"<h2>The {name} {_moved(*_medians(history, figure))}</h2>",
        f"<p>{html.escape(said_of_layers(history, figure, name))}</p>",
        *drawn(picture, described, caption),
    ]


def _moved(first: float, last: float) -> str:
    """What a number did between these two, as a verb."""
    if math.isnan(first) or math.isnan(last):
        return "is not known throughout"
    if not abs(last - first) > LITTLE * abs(first):
        return "hardly moved"
    return "rose" if last > first else "fell"


def _ends(history: History) -> tuple[float, float]:
    """The mean loss of the first and of the last steps."""
    loss, window = history["loss"], run_pictures.window_of(history)
    return sum(loss[:window]) / window, sum(loss[-window:]) / window


def said_of_losses(history: History) -> str:
    """Where the loss began and ended, in a sentence."""
    first, last = _ends(history)
    window, steps = run_pictures.window_of(history), len(history["loss"])
    over = "" if window == 1 else f" (means of {window})"
    said = f"From {first:.4g} to {last:.4g} nats in {steps:,} steps{over}."
    if history["held_out"]:
        step, best = min(history["held_out"], key=lambda one: one[1])
        said += f" On held-out rows it was lowest after step {step:,}: {best:.4g}."
    return said


def _medians(history: History, figure: str) -> tuple[float, float]:
    """The median layer's figure at the first look and at the last."""
    series = [one for own in run_pictures.lines_of(history, figure).values() for one in own]
    first, last = (run_pictures.median([one[at] for one in series]) for at in (0, -1))
    return first, last


def said_of_layers(history: History, figure: str, name: str) -> str:
    """How a figure's median went from the first look to the last, and which kind is highest."""
    first, last = _medians(history, figure)
    lines, steps = run_pictures.lines_of(history, figure), history["steps"]
    ends = {kind: run_pictures.median([one[-1] for one in own]) for kind, own in lines.items()}
    known = {kind: value for kind, value in ends.items() if not math.isnan(value)}
    said = (
        f"The median layer's {name} went from {_told(first)} after step {steps[0]:,} to "
        f"{_told(last)} after step {steps[-1]:,}"
    )
    if len(known) < 2:
        return f"{said}."
    top, low = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
    return f"{said}; at the end {top} has most ({known[top]:.3g}), {low} least ({known[low]:.3g})."


def _told(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.3g}"


def audited(figures: Sequence[tuple[str, str]]) -> list[str]:
    """What was in the training data."""
    rows = [[name, value] for name, value in figures]
    return [
        "<h2>What it was trained on</h2>",
        "<p>The audit before the first step: every row that was dropped, cut or seen twice is "
        "counted here.</p>",
        table(("training data", "counted"), rows),
    ]


def planned(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was predicted before training, beside what was measured."""
    rows = [
        [
            one["what"],
            readable(one["predicted"]),
            readable(one["measured"]),
            f"{one['measured'] / one['predicted'] - 1:+.1%}" if one["predicted"] else "-",
            one["how"],
        ]
        for one in figures
    ]
    return [
        "<h2>Plan against measured</h2>",
        "<p>Memory is planned for a training step; measured are the steps that were counted, with "
        "the evaluations that followed them.</p>",
        table(("", "planned", "measured", "off by", "how"), rows),
    ]


def parity(found: Mapping[str, Any]) -> list[str]:
    """How far the merged model is from the un-merged one."""
    where = html.escape(found["folder"])
    if found.get("skipped"):
        return [
            "<h2>Merged, and not proved</h2>",
            f"<p>{where}: parity was not measured. Nothing shows that the merged model gives the "
            "adapter's outputs.</p>",
        ]
    told: Sequence[tuple[str, str, Callable[[float], str]]] = (
        ("largest logit difference", "max_abs", lambda value: f"{value:.2e}"),
        ("the largest that rounding explains", "tolerance", lambda value: f"{value:.2e}"),
        ("mean logit difference", "mean_abs", lambda value: f"{value:.2e}"),
        ("largest that the adapter itself makes", "effect", lambda value: f"{value:.2e}"),
        ("same top token", "top1", lambda value: f"{value:.1%} of positions"),
        ("KL divergence", "kl", lambda value: f"{value:.2e} nats"),
    )
    rows = [[name, show(found[key])] for name, key, show in told if key in found]
    return [
        "<h2>Merged equals un-merged</h2>",
        f"<p>{where} was read again from disk and run beside base + adapter.</p>",
        table(("merged against un-merged", "measured"), rows),
    ]
