"""The command line's surface: every verb, its places and settings, in one table (floor 7).

Nothing here may import torch: `sidepath --help` reads this table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sidepath.cli.combining_run import CombineRun, ExtractRun
from sidepath.cli.compare_run import CompareRun
from sidepath.cli.convert_run import ConvertRun
from sidepath.cli.inspect_run import InspectRun
from sidepath.cli.options import Sections
from sidepath.cli.output import Report
from sidepath.cli.runs import (
    BenchRun,
    DemoRun,
    EvalRun,
    GenerateRun,
    MergeRun,
    Nothing,
    PlanRun,
    TrainRun,
)
from sidepath.cli.serve_run import ServeRun
from sidepath.cli.settings import Settings
from sidepath.cli.sharing_runs import LibraryRun, PushRun
from sidepath.config import TrainConfig
from sidepath.errors import ConfigError, meant


@dataclass(frozen=True)
class Call:
    """One command as it was asked for."""

    verb: str
    places: tuple[str, ...]
    settings: Settings
    method: str | None
    as_json: bool
    command: str
    """The whole command as it could be typed again."""


@dataclass(frozen=True)
class Verb:
    """One command. `places` are its arguments without a flag: NAME, [NAME], NAME... or
    [NAME]... .
    """

    summary: str
    table: str
    run: type
    code: str
    """Where its function is, `module:function`; imported when the verb is called."""
    places: tuple[str, ...] = ()
    details: str = ""
    """What the help says beside the summary."""
    method: bool = False
    """Whether a method's settings are flags as well."""
    reads: bool = True
    """Whether it reads the places it is given: then those on the hub are fetched first."""
    training: bool = False
    """Whether the training loop's settings are flags as well."""

    def function(self) -> Callable[[Call], Report]:
        """The function that does it."""
        module, _, name = self.code.partition(":")
        function: Callable[[Call], Report] = vars(importlib.import_module(module))[name]
        return function


SETTINGS_FILE = "[CONFIG]"
"""The place of a verb whose settings file is an argument, not behind --config."""

VERBS: Mapping[str, Verb] = {
    "demo": Verb(
        "fine-tune three adapters on the embedded base, prove them, and write a report",
        "demo",
        DemoRun,
        "sidepath.cli.verbs:demo",
    ),
    "plan": Verb(
        "show what would be adapted, with parameters and memory, without loading weights",
        "plan",
        PlanRun,
        "sidepath.cli.verbs:plan",
        places=("MODEL",),
        method=True,
    ),
    "train": Verb(
        "train an adapter on your data and save it",
        "run",
        TrainRun,
        "sidepath.cli.training:train",
        method=True,
        training=True,
    ),
    "eval": Verb(
        "measure a base or an adapter on held-out data",
        "eval",
        EvalRun,
        "sidepath.cli.answers:evaluate",
    ),
    "generate": Verb(
        "complete prompts with a base or an adapter",
        "generate",
        GenerateRun,
        "sidepath.cli.answers:generate",
    ),
    "compare": Verb(
        "train several methods on one data set at equal budget, and say which differences are real",
        "compare",
        CompareRun,
        "sidepath.cli.comparing:compare",
        places=(SETTINGS_FILE,),
        details="CONFIG is a TOML file: tables [compare] and [train] with the settings below, and "
        "a table [[method]] for each entrant: name, fields of that method, and if need be a label, "
        "learning_rates of its own, and a grid of fields' values, all combinations of which take "
        "part. --preset and --intrinsic need none.",
        training=True,
    ),
    "inspect": Verb(
        "show what an adapter learned or two share, make it smaller, say how small is enough",
        "inspect",
        InspectRun,
        "sidepath.cli.inspecting:inspect",
        places=("ADAPTER", "[OTHER]"),
    ),
    "merge": Verb(
        "fold adapters into a copy of the base: a plain transformers folder",
        "merge",
        MergeRun,
        "sidepath.cli.verbs:merge",
        places=("BASE", "ADAPTER...", "OUT"),
    ),
    "push": Verb(
        "upload an adapter to the hub, with a model card",
        "push",
        PushRun,
        "sidepath.cli.sharing:push",
        places=("ADAPTER", "TARGET"),
        details="TARGET is hub:OWNER/NAME[@BRANCH]; log in with `hf auth login`.",
    ),
    "library": Verb(
        "list a folder of adapters: methods, bases, sizes, metrics, and what is damaged",
        "library",
        LibraryRun,
        "sidepath.cli.sharing:library",
        places=("FOLDER",),
    ),
    "convert": Verb(
        "write an adapter in another tool's format, or read one; check what vLLM would take",
        "convert",
        ConvertRun,
        "sidepath.cli.converting:convert",
        places=("IN", "[OUT]"),
    ),
    "combine": Verb(
        "make one adapter of several: a weighted sum of their updates, exact or cut, TIES, DARE",
        "combine",
        CombineRun,
        "sidepath.cli.combining:combine",
        places=("ADAPTER...", "OUT"),
    ),
    "extract": Verb(
        "make an adapter of the difference of two full checkpoints",
        "extract",
        ExtractRun,
        "sidepath.cli.combining:extract",
        places=("BASE", "TUNED", "OUT"),
    ),
    "serve": Verb(
        "answer requests to a base and a folder of adapters, as OpenAI's server does",
        "serve",
        ServeRun,
        "sidepath.cli.serving:serve",
    ),
    "bench": Verb(
        "measure training, memory, decoding, routing and switching beside PEFT",
        "bench",
        BenchRun,
        "sidepath.cli.verbs:bench",
        places=("[FIGURE]...",),
        details="FIGURE is a family (step, memory, decode, routed, switching, compiled) or one of "
        "its figures, as in step-llama-bf16; without any, all that do not take minutes.",
    ),
    "config": Verb(
        "print each setting that train would use, and where it came from",
        "run",
        TrainRun,
        "sidepath.cli.verbs:config",
        method=True,
        reads=False,
        training=True,
    ),
    "doctor": Verb(
        "say what is installed, what is missing, and which devices there are",
        "doctor",
        Nothing,
        "sidepath.cli.doctor:doctor",
        reads=False,
    ),
    "completion": Verb(
        "print a script that completes these commands in your shell",
        "completion",
        Nothing,
        "sidepath.cli.completion:completion",
        places=("SHELL",),
        details="SHELL is bash, zsh or fish; the script says in its first lines where it goes.",
        reads=False,
    ),
}


def sections_of(verb: Verb, method: str | None) -> Sections:
    """The tables of a verb's settings: its own, the method's, the training loop's."""
    sections: dict[str, type] = {verb.table: verb.run}
    if verb.method and method is not None:
        from sidepath.methods import METHODS

        if method not in METHODS:
            raise ConfigError(
                f'unknown method "{method}"',
                expected=", ".join(METHODS),
                hint=meant(method, METHODS),
            )
        sections[method] = METHODS[method]
    if verb.training:
        sections["train"] = TrainConfig
    return sections


def other_tables(sections: Sections) -> list[str]:
    """Tables that only other verbs read. Another method's would be ignored: that is an error."""
    from sidepath.methods import METHODS

    tables = dict.fromkeys([*(verb.table for verb in VERBS.values()), *METHODS, "train"])
    return [table for table in tables if table not in sections]
