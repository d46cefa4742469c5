"""The verb completion: scripts that complete our commands in a shell (floor 7)."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from sidepath.cli.options import Flag, flags_of
from sidepath.cli.output import Report
from sidepath.cli.surface import VERBS, Call, Verb, sections_of
from sidepath.errors import ConfigError, meant

EVERYWHERE = ("--config", "--json", "--help")
"""Flags of every verb."""


def completion(call: Call) -> Report:
    """The script for one shell, on standard output; its first lines say where it goes."""
    shell = call.places[0]
    if shell not in SHELLS:
        raise ConfigError(
            f'no completion for "{shell}"', expected=", ".join(SHELLS), hint=meant(shell, SHELLS)
        )
    script = SHELLS[shell]()
    return Report({"shell": shell, "script": script}, [script.rstrip("\n")])


@functools.cache
def flags_of_verb(verb: Verb) -> tuple[Flag, ...]:
    """A verb's flags; those of every method where it takes one."""
    from sidepath.methods import METHODS

    found: dict[str, Flag] = {}
    for method in METHODS if verb.method else (None,):
        for flag in flags_of(sections_of(verb, method)):
            found.setdefault(flag.name, flag)
    return tuple(found.values())


def values_of(flag: Flag) -> Sequence[str]:
    """What a flag may be, where that is a few words."""
    if typing.get_origin(flag.kind) is not Literal:
        return ()
    return tuple(str(value) for value in typing.get_args(flag.kind))


def names_of(verb: Verb) -> list[str]:
    """A verb's flags as they are typed; one that is on or off can be switched off too."""
    names = [
        name
        for flag in flags_of_verb(verb)
        for name in (flag.name, *([f"--no-{flag.name[2:]}"] if flag.kind is bool else []))
    ]
    return [*names, *EVERYWHERE]


def _chosen(line: str) -> list[str]:
    """A line of a case statement for each flag whose values are a few words."""
    return [
        line.format(verb=name, flag=flag.name, values=" ".join(values))
        for name, verb in VERBS.items()
        for flag in flags_of_verb(verb)
        if (values := values_of(flag))
    ]


def bash() -> str:
    """A function for `complete -F`; where it has nothing to say bash completes files."""
    flags = [
        f'        {name}) words="{" ".join(names_of(verb))}" ;;' for name, verb in VERBS.items()
    ]
    return "\n".join(
        [
            "# sidepath completion bash > ~/.local/share/bash-completion/completions/sidepath",
            "_sidepath() {",
            '    local word="${COMP_WORDS[COMP_CWORD]}" words=""',
            '    local before="${COMP_WORDS[COMP_CWORD-1]}"',
            "    COMPREPLY=()",
            '    if [ "$COMP_CWORD" -eq 1 ]; then',
            f'        words="{" ".join(VERBS)} --help --version"',
            "    fi",
            '    case "${COMP_WORDS[1]} $before" in',
            *_chosen('        "{verb} {flag}") words="{values}" ;;'),
            "    esac",
            '    if [ -z "$words" ] && [[ "$word" == -* ]]; then',
            '        case "${COMP_WORDS[1]}" in',
            *flags,
            "        esac",
            "    fi",
            '    if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$word")); fi',
            "}",
            "complete -o default -F _sidepath sidepath",
            "",
        ]
    )


def zsh() -> str:
    """A function for zsh's completion system."""
    described = " ".join(
        _quoted(name + ":" + verb.summary.replace(":", "\\:")) for name, verb in VERBS.items()
    )
    flags = [
        f"      {name}) compadd -- {' '.join(names_of(verb))} ;;" for name, verb in VERBS.items()
    ]
    return "\n".join(
        [
            "#compdef sidepath",
            '# sidepath completion zsh > "${fpath[1]}/_sidepath"',
            "_sidepath() {",
            "  if (( CURRENT == 2 )); then",
            f"    local -a verbs=({described})",
            "    _describe command verbs",
            "    return",
            "  fi",
            '  case "$words[2] $words[CURRENT-1]" in',
            *_chosen("    '{verb} {flag}') compadd -- {values}; return ;;"),
            "  esac",
            '  if [[ "$words[CURRENT]" == -* ]]; then',
            '    case "$words[2]" in',
            *flags,
            "    esac",
            "  else",
            "    _files",
            "  fi",
            "}",
            '_sidepath "$@"',
            "",
        ]
    )


def fish() -> str:
    """A line for each command and flag, with what it is for."""
    lines = ["# sidepath completion fish > ~/.config/fish/completions/sidepath.fish"]
    for name, verb in VERBS.items():
        told = _quoted(verb.summary)
        lines.append(f"complete -c sidepath -n __fish_use_subcommand -f -a {name} -d {told}")
        for flag in flags_of_verb(verb):
            values = values_of(flag)
            wants = "" if flag.kind is bool else " -r"
            if values:
                wants = f" -x -a {_quoted(' '.join(values))}"
            told = _quoted(flag.doc.partition(". ")[0].partition("; ")[0])
            seen = _quoted(f"__fish_seen_subcommand_from {name}")
            lines.append(f"complete -c sidepath -n {seen} -l {flag.name[2:]}{wants} -d {told}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    """Text in single quotes, which end and begin again around one of its own."""
    return "'" + text.replace("'", "'\\''") + "'"


SHELLS: Mapping[str, Callable[[], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
