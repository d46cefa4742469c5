"""What the documentation site takes from the code: mkdocs loads this as a hook (`mkdocs.yml`).

A line `{{ name }}` or `{{ name ARGUMENT }}` of a page stands for what `MAKERS[name]` makes of the
argument: so methods, commands, settings and public names are told in one place, the code.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import sidepath
from sidepath import config, errors
from sidepath.cli.options import Flag, flags_of, shown
from sidepath.cli.surface import VERBS, Verb, sections_of
from sidepath.methods import METHODS
from sidepath.methods.base import Method

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^\{\{ (\w+)(?: (\S+))? \}\}$", re.MULTILINE)
TRAINING = "train"
"""The table of the training loop's settings, which several verbs have."""


def on_page_markdown(markdown: str, **_: object) -> str:
    """Mkdocs' hook: a page's text before it is rendered."""
    return filled(markdown)


def filled(text: str) -> str:
    """The text with each of its marks replaced. Errors: `KeyError` for a mark nothing makes."""
    return MARK.sub(lambda found: MAKERS[found[1]](found[2] or ""), text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def settings(cls_name: str) -> str:
    """The fields of a class of settings, by the name of its table."""
    classes: Mapping[str, type] = {TRAINING: config.TrainConfig, **METHODS}
    return _settings(flags_of({cls_name: classes[cls_name]}))


def _settings(flags: Iterable[Flag]) -> str:
    rows = [
        (
            f"`{flag.name}`",
            config.type_name(flag.hint).replace(" or nothing", ""),
            "needed" if flag.needed else f"`{shown(flag.default)}`",
            flag.doc,
        )
        for flag in flags
    ]
    return table(["flag", "value", "default", "what"], rows) if rows else ""


def verbs(_: str) -> str:
    """Every command: its summary, its usage and its flags."""
    return "\n".join(_verb(name, verb) for name, verb in VERBS.items())


def _verb(name: str, verb: Verb) -> str:
    said = f"{verb.summary[0].upper()}{verb.summary[1:]}. {verb.details}".rstrip()
    usage = " ".join(["sidepath", name, *verb.places, "[flags]"])
    flags = flags_of(sections_of(verb, None))
    parts = [f"## {name}\n", f"{said}\n", f"    {usage}\n"]
    parts.append(_settings(flag for flag in flags if flag.section != TRAINING))
    if verb.method:
        parts.append("And the settings of [the method](../methods.md), which `--method` names.\n")
    if verb.training:
        other = [flag for flag in flags if flag.section == TRAINING and flag.name != _plain(flag)]
        renamed = "".join(f"; `{_plain(flag)}` is `{flag.name}` here" for flag in other)
        parts.append(f"And those of [the training loop](#the-training-loop){renamed}.\n")
    return "\n".join(parts)


def _plain(flag: Flag) -> str:
    return "--" + flag.field.replace("_", "-")


def methods(_: str) -> str:
    """Every method, its class, and what it trains of GPT-2 small."""
    rows = [
        (f"[`{name}`](#{name})", f"`{cls.__name__}`", trained(name), _first(cls))
        for name, cls in METHODS.items()
    ]
    return table(["method", "class", "trained", "what"], rows)


def _first(cls: type) -> str:
    """The first sentence of a class's docstring."""
    text = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s|:\s", text)[0]


def method(name: str) -> str:
    """What a method's class says of itself, and its settings."""
    cls = METHODS[name]
    said = inspect.getdoc(cls) or ""
    return f"{said}\n\nTrained by default on GPT-2 small: {trained(name)}.\n\n{settings(name)}"


@functools.cache
def trained(name: str) -> str:
    """How many numbers a method's defaults train of GPT-2 small (124,439,808 parameters)."""
    model = _gpt2()
    if name == "fusion":  # composes adapters that stand on the model
        for one in ("a", "b"):
            sidepath.inject(model, sidepath.Bottleneck(kind="pfeiffer"), name=one)
    cls: Any = METHODS[name]
    made: Method = cls()
    return f"{sidepath.plan(model, made, activations=False).trainable:,}"


def _gpt2() -> Any:
    """GPT-2 small by its config alone, without memory."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config())


def api(_: str) -> str:
    """Every public name, for mkdocstrings."""
    homes = {
        name: _home(name) for name in sidepath.__all__ if name not in ("__version__", "errors")
    }
    names = [*homes.values(), "sidepath.errors"]
    return "\n\n".join(f"::: {name}" for name in names)


def _home(name: str) -> str:
    """Where a public name is defined."""
    return f"{vars(sidepath)['_HOMES'][name]}.{name}"


def tree(_: str) -> str:
    """The tree of all exceptions."""
    lines = (errors.__doc__ or "").splitlines()
    return "\n".join(line[4:] for line in lines if line.startswith("    "))


def file(name: str) -> str:
    """A text file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


MAKERS: Mapping[str, Callable[[str], str]] = {
    made.__name__: made for made in (api, file, method, methods, settings, tree, verbs)
}
