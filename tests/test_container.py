"""The Containerfile: its syntax, and what it promises. Nothing is built and no image is fetched."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidepath.cli.parsing import parse
from sidepath.cli.serve_run import ServeRun

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN",
    "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip
"""Instructions that we use. ADD, which fetches and unpacks, is none of them."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, lines that go on joined."""

    line: int
    name: str
    rest: str

    @property
    def form(self) -> list[str]:
        """The words of an instruction in its exec form, a JSON list."""
        words = json.loads(self.rest[self.rest.index("[") :])
        assert all(isinstance(word, str) for word in words)
        return list(words)


def instructions(text: str) -> list[Instruction]:
    """A Containerfile's instructions. Errors: `ValueError` that names the line."""
    found: list[Instruction] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        start, line = number + 1, lines[number].strip()
        number += 1
        if not line or line.startswith("#"):
            continue
        while line.endswith("\\"):
            if number == len(lines):
                raise ValueError(f"line {start}: goes on behind the end")
            line = f"{line[:-1].rstrip()} {lines[number].strip()}"
            number += 1
        name, _, rest = line.partition(" ")
        if name not in KNOWN or not rest.strip():
            raise ValueError(
                f"line {start}: {name} is no instruction that is known, or says nothing"
            )
        if not found and name not in ("FROM", "ARG"):
            raise ValueError(f"line {start}: {name} before FROM")
        if name in ("RUN", "COPY", "ENV", "LABEL") and "[" not in rest:
            shlex.split(rest)  # a quote that is left open is an error
        found.append(Instruction(start, name, rest.strip()))
    return found


FILE = instructions((ROOT / "Containerfile").read_text())
LAST = FILE[max(index for index, one in enumerate(FILE) if one.name == "FROM") :]
"""The stage that is shipped."""


def only(name: str) -> Instruction:
    """The one instruction of that name in the stage that is shipped."""
    (one,) = [one for one in LAST if one.name == name]
    return one


def test_it_runs_as_a_user_without_rights() -> None:
    user, _, group = only("USER").rest.partition(":")
    assert int(user) > 0
    assert int(group) > 0
    after = LAST[LAST.index(only("USER")) :]
    assert not [one for one in after if one.name in ("RUN", "COPY")]
    assert f"--uid {user}" in " ".join(one.rest for one in LAST if one.name == "RUN")


def test_it_writes_nothing_outside_of_tmp() -> None:
    settings = dict(word.partition("=")[::2] for word in shlex.split(only("ENV").rest))
    assert settings["HOME"] == "/tmp"
    assert settings["PYTHONDONTWRITEBYTECODE"] == "1"
    assert settings["HF_HUB_OFFLINE"] == "1"
    assert only("WORKDIR").rest == "/tmp"
    head = (ROOT / "Containerfile").read_text().partition("\nFROM")[0]
    for flag in ("--read-only", "--tmpfs /tmp", "--cap-drop all", "no-new-privileges"):
        assert flag in head


def test_the_command_is_one_of_ours() -> None:
    words = [*only("ENTRYPOINT").form, *only("CMD").form]
    assert words[:2] == ["sidepath", "serve"]
    run = parse("serve", words[2:]).settings.build("serve", ServeRun)
    assert str(run.port) == only("EXPOSE").rest
    volume = only("VOLUME").form[0]
    assert str(run.base).startswith(volume)
    assert str(run.adapters).startswith(volume)


def test_health_is_asked_on_the_servers_own_route() -> None:
    check = only("HEALTHCHECK")
    program, flag, code = check.form
    assert (program, flag) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    assert f"http://127.0.0.1:{only('EXPOSE').rest}/healthz" in code
    assert re.search(r"--timeout=\d+s", check.rest)
    assert only("STOPSIGNAL").rest == "SIGTERM"


def test_what_is_copied_is_there_and_is_let_through() -> None:
    let_through = (ROOT / ".dockerignore").read_text().split()
    assert let_through[0] == "*"
    for one in FILE:
        if one.name == "COPY" and "--from" not in one.rest:
            for name in one.rest.split()[:-1]:
                assert (ROOT / name).exists()
                assert f"!{name.removeprefix('./')}" in let_through


def test_versions_are_those_that_were_tested() -> None:
    commands = " ".join(one.rest for one in FILE if one.name == "RUN")
    assert "--constraint constraints.txt" in commands
    assert "'.[serve]'" in commands
    assert all(":" in one.rest for one in FILE if one.name == "FROM")


@pytest.mark.parametrize(
    "text",
    [
        "RUN true\n",
        "FROM a:1\nRUM true\n",
        "FROM a:1\nRUN\n",
        "FROM a:1\nRUN true \\",
        "FROM a:1\nRUN echo 'open\n",
        "FROM a:1\nADD b c\n",
    ],
)
def test_wrong_syntax_is_found(text: str) -> None:
    with pytest.raises(ValueError):
        instructions(text)
