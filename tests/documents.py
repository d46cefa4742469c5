"""The code of our documents, found and run as a reader would run it.

A document is a story: its blocks run from top to bottom in one folder, and what one leaves the next
one finds. The word behind a fence says what a block is, its title what is special about it:

    ```sh                          commands of ours, run in this process
    ```python                      run; all of a document's share their names
    ```toml title="a.toml"         a file that the reader writes
    ```sh title="needs a GPU"      not run: commands of ours are parsed, Python is compiled
    ```text                        something to look at
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidepath.base import embedded_base
from sidepath.cli import main
from sidepath.cli.parsing import help_text, parse
from sidepath.demo.tasks import make_tasks

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w*)[ \t]*([^\n]*)\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
NEEDS = "needs "
LOOKED_AT = ("text", "json")
"""Blocks that show what comes out."""
LAUNCHER = "sidepath --"
"""What stands before our command where torchrun starts it."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    document: str
    line: int
    """The line of its fence."""
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.document}:{self.line}"

    @property
    def lacking(self) -> str | None:
        """What it needs that no test has, or None."""
        return self.title.removeprefix(NEEDS) if self.title.startswith(NEEDS) else None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command in it, lines that go on joined and remarks left out."""
        joined = self.text.replace("\\\n", " ")
        return [
            words for line in joined.splitlines() if (words := shlex.split(line, comments=True))
        ]


def blocks_of(document: Path) -> list[Block]:
    """The fenced blocks of a document."""
    text, name = document.read_text(encoding="utf-8"), document.name
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]*)"', match[2])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(name, line, match[1], title[1] if title else "", match[3]))
    return found


def ours(words: list[str]) -> list[str] | None:
    """The words behind `sidepath` of a command of ours, torchrun's included; None for others."""
    if words[0] == "sidepath":
        return words[1:]
    line = shlex.join(words)
    if words[0] == "torchrun" and LAUNCHER in line:
        return words[words.index("--") + 1 :]
    return None


def parsed(words: list[str]) -> None:
    """Hold a command of ours against the command line's surface; nothing is run or read.

    Errors: `ConfigError` for a command, a flag, a value or a number of places that there is not.
    """
    verb, *arguments = words
    if "--help" in arguments:
        help_text(verb, arguments)
        return
    call = parse(verb, arguments)
    for section, cls in call.settings.sections.items():
        if not call.settings.missing(section):
            call.settings.build(section, cls)


class Reader:
    """Somebody who does what a document says, in one folder, which is the current one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "document"}

    def do(self, block: Block) -> None:
        """Run one block, or check what cannot be run. Errors: `AssertionError` and the block's."""
        if block.lacking is not None:
            checked(block)
        elif block.title:
            self._write(block)
        elif block.language == "python":
            exec(compile(block.text, block.place, "exec"), self.names)
        elif block.language == "sh":
            for words in block.commands:
                mine = ours(words)
                assert mine is not None, (
                    f"{block.place}: nothing runs {words[0]}: say what it needs"
                )
                assert main(mine) == 0, f"{block.place}: {shlex.join(words)}"
        else:
            assert block.language in LOOKED_AT, f"{block.place}: a {block.language} without a title"

    def _write(self, block: Block) -> None:
        if block.language == "toml":
            tomllib.loads(block.text)
        (self.folder / block.title).write_text(block.text)


def checked(block: Block) -> None:
    """What can be said of a block that is not run."""
    if block.language == "python":
        compile(block.text, block.place, "exec")
    elif block.language == "sh":
        for words in block.commands:
            mine = ours(words)
            if mine is not None:
                parsed(mine)


def furnish(folder: Path) -> None:
    """Put into a folder what our documents take for granted: data files and a base, `my-model`."""
    rows = make_tasks()[1].train[:16]
    for name in ("sql.jsonl", "train.jsonl", "dev.jsonl", "a.jsonl", "b.jsonl"):
        write_rows(folder / name, rows)
    reviews = "".join(f'"{word} film {n}",{word}\n' for n in range(8) for word in ("good", "bad"))
    (folder / "reviews.csv").write_text(f"text,label\n{reviews}")
    (folder / "sample.txt").write_text("How many cities are there?\nA line of its own.\n")
    shutil.copytree(embedded_base(), folder / "my-model")


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def furnish_adapters(folder: Path) -> None:
    """Train what documents call `adapters/mine` and `adapters/other`, in the current folder."""
    for seed, name in enumerate(("mine", "other")):
        trained = f"train --base my-model --data train.jsonl --output adapters/{name} --steps 2"
        assert main([*trained.split(), "--no-forgetting", "--seed", str(seed)]) == 0


def pages() -> Mapping[str, Path]:
    """Every page of the documentation by its path in the folder."""
    found: Iterator[Path] = DOCS.rglob("*.md")
    return {path.relative_to(DOCS).as_posix(): path for path in sorted(found)}
