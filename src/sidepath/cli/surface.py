"""The command line's surface: every verb, its places and settings, in one table (floor 7).

Nothing here may import torch: `sidepath --help` reads this table.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sidepath.cli.compare_run import CompareRun
from sidepath.cli.inspect_run import InspectRun
from sidepath.cli.options import Parser, Sections, add_flags, flags_of, parse_value
from sidepath.cli.output import Report
from sidepath.cli.runs import (
    BenchRun,
    DemoRun,
    EvalRun,
    GenerateRun,
    MergeRun,
    PlanRun,
    TrainRun,
)
from sidepath.cli.serve_run import ServeRun
from sidepath.cli.settings import Settings, read_file, read_tables
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
        training=True,
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


def parser_of(name: str, sections: Sections) -> Parser:
    """The verb's argument parser."""
    verb = VERBS[name]
    usage = " ".join(["sidepath", name, *verb.places, "[flags]"])
    parser = Parser(
        prog=f"sidepath {name}",
        usage=usage,
        description=f"{verb.summary[0].upper()}{verb.summary[1:]}. {verb.details}".rstrip(),
        epilog="A flag wins over the settings file, the file over the default.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("places", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="TOML file with the settings")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("-h", "--help", action="store_true", help="print this help")
    add_flags(parser, flags_of(sections))
    return parser


def parse(name: str, arguments: Sequence[str]) -> Call:
    """What the user asked of this verb."""
    verb = VERBS[name]
    method, file = _method_and_file(verb, arguments)
    sections = sections_of(verb, method)
    parser = parser_of(name, sections)
    found, extra = parser.parse_known_intermixed_args(list(arguments))
    if extra:
        flag = extra[0].partition("=")[0]
        known = [*(known.name for known in flags_of(sections)), "--config", "--json", "--help"]
        hint = meant(flag, known) or f"see sidepath {name} --help"
        raise ConfigError(f"unknown flag {flag}", hint=hint)
    _count_places(name, verb, found.places)
    given = vars(found)
    from_flags = {
        (flag.section, flag.field): parse_value(flag, given[f"{flag.section}.{flag.field}"])
        for flag in flags_of(sections)
        if f"{flag.section}.{flag.field}" in given
    }
    if file is not None and SETTINGS_FILE in verb.places:
        raise ConfigError(
            f"{name} takes its settings file without a flag", hint=f"sidepath {name} {file}"
        )
    from_file = {} if file is None else read_file(file, sections, other_tables(sections))
    settings = Settings(sections, from_file, from_flags, file)
    command = shlex.join(["sidepath", name, *arguments])
    return Call(name, tuple(found.places), settings, method, found.json, command)


def help_text(name: str, arguments: Sequence[str]) -> str:
    """The verb's help; it shows the flags of the method that the arguments name."""
    verb = VERBS[name]
    method, _ = _method_and_file(verb, arguments)
    return parser_of(name, sections_of(verb, method)).format_help()


def _method_and_file(verb: Verb, arguments: Sequence[str]) -> tuple[str | None, str | None]:
    """The method decides which flags there are, so it and the file are looked for first."""
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--method")
    found, _ = early.parse_known_args(list(arguments))
    if not verb.method:
        return None, found.config
    method = found.method
    if method is None and found.config is not None:
        table = read_tables(found.config).get(verb.table)
        method = table.get("method") if isinstance(table, dict) else None
    if method is None:
        flags = flags_of({verb.table: verb.run})
        method = next(flag.default for flag in flags if flag.field == "method")
    return str(method), found.config


def other_tables(sections: Sections) -> list[str]:
    """Tables that only other verbs read. Another method's would be ignored: that is an error."""
    from sidepath.methods import METHODS

    tables = dict.fromkeys([*(verb.table for verb in VERBS.values()), *METHODS, "train"])
    return [table for table in tables if table not in sections]


def _count_places(name: str, verb: Verb, given: Sequence[str]) -> None:
    least = sum(not place.startswith("[") for place in verb.places)
    most = None if any(place.endswith("...") for place in verb.places) else len(verb.places)
    if len(given) < least or (most is not None and len(given) > most):
        raise ConfigError(
            f"{name} takes {' '.join(verb.places) or 'flags only'}",
            found=" ".join(given) or "nothing",
            hint=f"see sidepath {name} --help",
        )


def overview() -> str:
    """The text of `sidepath --help`."""
    width = max(len(name) for name in VERBS)
    lines = [f"  {name.ljust(width)}  {verb.summary}" for name, verb in VERBS.items()]
    head = """\
        usage: sidepath COMMAND ...

        Low-rank adaptation of language models: fine-tune, prove, merge and compare.

        """
    tail = """

        sidepath COMMAND --help tells a command's flags; --version prints the version.
        SIDEPATH_DEBUG=1 shows the traceback of an error."""
    return textwrap.dedent(head) + "\n".join(lines) + textwrap.dedent(tail)


def unknown_verb(name: str) -> ConfigError:
    """The error for a command that does not exist."""
    return ConfigError(
        f'unknown command "{name}"',
        expected=", ".join(VERBS),
        hint=meant(name, VERBS) or "see sidepath --help",
    )
