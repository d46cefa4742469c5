"""The command line as a whole: its help, and the error for a command it has not (floor 7).

Nothing here may import torch: `sidepath --help` is this text.
"""

from __future__ import annotations

import textwrap

from sidepath.cli.surface import VERBS
from sidepath.errors import ConfigError, meant


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
