"""The demo's report: one HTML file with its pictures inside, readable without a network."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidepath.store.plan import readable

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #ffffff; --soft: #5c5c66;
        --line: #d8d8de; --tint: #f4f4f7; --good: #0b6e4f; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --paper: #17171a; --soft: #a5a5b0;
        --line: #3a3a42; --tint: #222227; --good: #63d2a6; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.4rem }
p.lead { color: var(--soft); margin-top: 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .93rem }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
         vertical-align: top } th:first-child, td:first-child, td.text, th.text { text-align: left }
thead th { border-bottom: 2px solid var(--line); font-weight: 600 }
td.best { color: var(--good); font-weight: 600 }
td.text { font-family: ui-monospace, monospace; font-size: .84rem; white-space: pre-wrap;
          overflow-wrap: anywhere; min-width: 9rem }
figure { margin: 1rem 0; background: #fff; border: 1px solid var(--line); border-radius: 6px;
         padding: .5rem } figure svg { width: 100%; height: auto; display: block }
figcaption { color: #444; font-size: .88rem; padding: .3rem }
code, pre { font-family: ui-monospace, monospace; font-size: .86rem }
pre { background: var(--tint); padding: .8rem; overflow-x: auto; border-radius: 6px }
"""

PICTURES_MISSING = "Pictures need matplotlib: pip install 'sidepath[report]'."


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
    title = "<title>Sidepath demo</title>"
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{view}{title}<style>{STYLE}</style>'
    text = "\n".join(body)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{text}\n</body></html>\n',
        encoding="utf-8",
    )


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
    try:
        import matplotlib
    except ImportError:
        return f"<p>{PICTURES_MISSING}</p>"
    matplotlib.use("svg")
    described = "Loss of each training step, LoRA and full fine-tuning, by task"
    return (
        f'<figure role="img" aria-label="{described}">{_loss_curves(tasks)}'
        f"<figcaption>{described}: cross-entropy in nats per supervised token, running mean of "
        "10 steps.</figcaption></figure>"
    )


def _loss_curves(tasks: Sequence[Mapping[str, Any]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    styles = (("LoRA", "lora_losses", "#0072b2", "-"), ("full", "full_losses", "#d55e00", "--"))
    for axis, task in zip(axes, tasks, strict=True):
        for label, key, colour, line in styles:
            axis.plot(running_mean(task[key], 10), line, color=colour, label=label, linewidth=1.6)
        axis.set_title(task["name"], fontsize=11)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value with up to `window - 1` before it."""
    return [
        sum(values[max(0, at - window + 1) : at + 1])
        / len(values[max(0, at - window + 1) : at + 1])
        for at in range(len(values))
    ]
