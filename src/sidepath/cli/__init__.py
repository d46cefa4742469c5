"""The command line (floor 7): `sidepath COMMAND ...`.

Exit codes: 0 done; 1 an internal fault; 2 the input is wrong; 130 interrupted; 143 stopped by
SIGTERM, with a checkpoint to go on from.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from sidepath.cli.output import note, show, speaks
from sidepath.cli.overview import overview, unknown_verb
from sidepath.cli.parsing import help_text, parse
from sidepath.cli.surface import VERBS
from sidepath.errors import SidepathError, SidepathNotice

__all__ = ["main"]

DEBUG = "SIDEPATH_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Never raises and never calls `exit`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments and arguments[0] in VERBS else None
    name = "sidepath" if verb is None else f"sidepath {verb}"
    try:
        return _top(arguments) if verb is None else _run(verb, arguments[1:])
    except SidepathError as error:
        return _fail(f"{name}: {error}", error.exit_code)
    except KeyboardInterrupt:
        return _fail(f"{name}: interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has gone; a second write at exit would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _unexpected(name, error)


def _top(arguments: Sequence[str]) -> int:
    if not arguments:
        note(overview())
        return 2
    if arguments[0] in ("-h", "--help"):
        print(overview(), flush=True)
        return 0
    if arguments[0] == "--version":
        from sidepath import __version__

        print(f"sidepath {__version__}", flush=True)
        return 0
    raise unknown_verb(arguments[0])


def _run(name: str, arguments: Sequence[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(help_text(name, arguments), end="", flush=True)
        return 0
    call = parse(name, arguments)
    # What a library prints must not land in the JSON document.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", SidepathNotice)
        if VERBS[name].reads:
            from sidepath.cli.places import pin

            call = pin(call)
        report = VERBS[name].function()(call)
    show(report, as_json=call.as_json)
    return 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    note(f"note: {message}")


def _unexpected(name: str, error: Exception) -> int:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{name}: {where}{error.strerror}", 2)
    text = " ".join(str(error).split())[:300]
    return _fail(
        f"{name}: internal fault: {type(error).__name__}: {text} ({DEBUG}=1 shows the traceback)", 1
    )


def _fail(message: str, code: int) -> int:
    if os.environ.get(DEBUG) == "1":
        traceback.print_exc()
    # Every process says what it failed on: it may be the only one that did.
    rank = "" if speaks() else f"process {os.environ['RANK']}: "
    print(rank + message, file=sys.stderr, flush=True)
    return code
