"""From what the user typed to one command: places, flags, the settings file (floor 7).

Nothing here may import torch: `sidepath --help` goes through it.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from sidepath.cli.options import Parser, Sections, add_flags, flags_of, parse_value
from sidepath.cli.settings import Settings, read_file, read_tables
from sidepath.cli.surface import SETTINGS_FILE, VERBS, Call, Verb, other_tables, sections_of
from sidepath.errors import ConfigError, meant


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


def _count_places(name: str, verb: Verb, given: Sequence[str]) -> None:
    least = sum(not place.startswith("[") for place in verb.places)
    most = None if any(place.endswith("...") for place in verb.places) else len(verb.places)
    if len(given) < least or (most is not None and len(given) > most):
        raise ConfigError(
            f"{name} takes {' '.join(verb.places) or 'flags only'}",
            found=" ".join(given) or "nothing",
            hint=f"see sidepath {name} --help",
        )
