"""The demo's report: one HTML file with its pictures inside, readable without a network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidepath.page import (
    COLOURS,
    PICTURES_MISSING,
    canvas,
    figure,
    has_matplotlib,
    page,
    running_mean,
    svg,
    table,
)
from sidepath.store.plan import readable


def write_report(path: Path, result: Mapping[str, Any]) -> None:
    """Write the report of a demo's result document to `path`."""
    tasks: Sequence[Mapping[str, Any]] = result["tasks"]
    body = [
        "<h1>Sidepath demo</h1>",
        f'<p class="lead">Three low-rank adapters over one frozen base, in '
        f"{result['seconds']:.0f} seconds. Scores are on rows that share no attribute combination "
        "with the training rows.</p>",
        "<h2>Before, after, and against full fine-tuning</h2>",
        _scores(tasks),
        _pictures(tasks),
        *(_task(task) for task in tasks),
        "<h2>Merged equals un-merged</h2>",
        "<p>Each adapter was folded into a plain transformers folder, which was read back from "
        "disk and run beside base + adapter.</p>",
        _parity(result["parity"]["each"]),
        "<h2>One batch, every row its own adapter</h2>",
        _mixed(result["routed"], equal=result["routed_equal"]),
    ]
    path.write_text(page("Sidepath demo", body), encoding="utf-8")


def score_rows(tasks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows base / LoRA / full fine-tuning of each task, as text."""
    rows = []
    for task in tasks:
        label = f"{task['name']} ({task['metric'].replace('_', ' ')})"
        rows.append([label, "base", f"{task['base']:.1f}", "0", "-", "-"])
        for name, key, prefix in (("LoRA", "lora", ""), ("full fine-tuning", "full", "full_")):
            rows.append(
                [
                    "",
                    name,
                    f"{task[key]:.1f}",
                    f"{task[f'{key}_trainable']:,}",
                    readable(task[f"{key}_bytes"]),
                    f"{task[f'{prefix}seconds']:.1f}",
                ]
            )
    return rows


SAMPLE_HEAD = ("prompt", "wanted", "base", "base + LoRA")


def samples(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first sample of each task: what the base wrote, and what it writes adapted."""
    keys = ("prompt", "completion", "base", "lora")
    texts = []
    for task in tasks:
        sample = task["samples"][0]
        lines = [
            f"  {label:<12}{' '.join(sample[key].split())}"
            for label, key in zip(SAMPLE_HEAD, keys, strict=True)
        ]
        texts.append("\n".join([task["name"], *lines]))
    return texts


def facts(result: Mapping[str, Any]) -> list[str]:
    """What was proved, a line each."""
    parity, routed = result["parity"], result["routed"]
    verdict = "equals" if result["routed_equal"] else "DIFFERS FROM"
    return [
        f"merged against un-merged, re-read from disk: largest logit difference "
        f"{parity['max_abs']:.1e}, same top token at {100 * parity['top1']:.1f} % of positions",
        f"a mixed batch of {routed['rows']} rows over {len(result['tasks'])} adapters and the base "
        f"{verdict} one row at a time (largest logit difference {routed['max_abs']:.1e})",
        f"{result['seconds']:.0f} seconds in all; report: {result['report']}",
    ]


SCORE_HEAD = ("task", "method", "score", "trained parameters", "saved", "seconds")


def _scores(tasks: Sequence[Mapping[str, Any]]) -> str:
    return table(SCORE_HEAD, score_rows(tasks), text=(0, 1))


def _task(task: Mapping[str, Any]) -> str:
    audit = task["audit"]
    rows = [
        [sample[key].strip() for key in ("prompt", "completion", "base", "lora")]
        for sample in task["samples"]
    ]
    return (
        f"<h2>{html.escape(task['name'])}: what it writes</h2>"
        f"<p>{html.escape(task['description'].rstrip('.'))}. "
        f"Audited before step 1: {audit['rows']} rows, "
        f"{100 * audit['supervised_share']:.1f} % of tokens supervised, end token in "
        f"{100 * audit['end_token_share']:.0f} % of rows, {audit['truncated']} truncated.</p>"
        + table(SAMPLE_HEAD, rows, text=(0, 1, 2, 3))
    )


def _parity(each: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        [
            name,
            f"{one['max_abs']:.2e}",
            f"{one['mean_abs']:.2e}",
            f"{100 * one['top1']:.1f} %",
            f"{one['kl']:.2e}",
        ]
        for name, one in each.items()
    ]
    head = ("adapter", "largest logit difference", "mean", "same top token", "KL (nats)")
    return table(head, rows)


def _mixed(routed: Mapping[str, Any], *, equal: bool) -> str:
    rows = [
        [name or "(base)", text]
        for name, text in zip(routed["adapters"], routed["texts"], strict=True)
    ]
    verdict = "equals" if equal else "DIFFERS FROM"
    return (
        f"<p>A batch of {routed['rows']} rows {verdict} the same rows one at a time: greedy tokens "
        f"{'equal' if routed['tokens_equal'] else 'different'}, largest logit difference "
        f"{routed['max_abs']:.1e}.</p>" + table(("adapter", "wrote"), rows, text=(1,))
    )


def _pictures(tasks: Sequence[Mapping[str, Any]]) -> str:
    if not has_matplotlib():
        return f"<p>{PICTURES_MISSING}</p>"
    described = "Loss of each training step, LoRA and full fine-tuning, by task"
    units = "cross-entropy in nats per supervised token, running mean of 10 steps"
    return figure(_loss_curves(tasks), described, f"{described}: {units}.")


def _loss_curves(tasks: Sequence[Mapping[str, Any]]) -> str:
    drawn = canvas(10, 3)
    axes = drawn.subplots(1, len(tasks), squeeze=False)[0]
    styles = (("LoRA", "lora_losses", "-"), ("full", "full_losses", "--"))
    for axis, task in zip(axes, tasks, strict=True):
        for (label, key, line), colour in zip(styles, COLOURS, strict=False):
            axis.plot(running_mean(task[key], 10), line, color=colour, label=label, linewidth=1.6)
        axis.set_title(task["name"], fontsize=11)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].legend(frameon=False)
    return svg(drawn, "losses")
