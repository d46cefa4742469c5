"""The soak itself: what it finds in a server that is right, and in what is wrong."""

from __future__ import annotations

import os
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from benchmarks.soak import at_the_end, generations, report, soak
from benchmarks.soak_callers import Place
from benchmarks.soak_checks import Answer, Checks, Standing
from benchmarks.soak_library import BASE, Library, Question, make_library
from transformers import AutoTokenizer

import sidepath
from sidepath.cli.gating import terms_of
from sidepath.cli.serve_run import ServeRun
from sidepath.serve.engine import Engine
from sidepath.serve.http import application
from sidepath.serve.keys import Key, add_key
from sidepath.serve.scheduler import Limits
from tests.serve.kit import embedded
from tests.serve.sockets import served

ASKED = Question("one", chat=False)


def test_a_few_seconds_against_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = make_library(tmp_path, names=3, versions=2, questions=3, new=6)
    keys = tmp_path / "keys.json"
    operator, tenant = (add_key(keys, Key(name=n, admin=n == "o")) for n in ("o", "t"))
    settings: dict[str, Any] = {"keys": str(keys), "allow_loading": str(library.root)}
    tokenizer: Any = AutoTokenizer.from_pretrained(sidepath.embedded_base())
    with Engine(embedded(), tokenizer, Limits(4, 2, 256, step_tokens=64)) as engine:
        for name in library.names:
            engine.adapters.register(name, library.served / name)
        made = application(engine, BASE, terms_of(ServeRun(**settings)))
        with served(made, **settings) as port:
            place = Place(port, operator, tenant)
            checks = Checks(library, generations(place))
            memory = soak(place, checks, clients=4, minutes=0, swaps=4, pid=os.getpid())
            left = at_the_end(place, checks)
    document = report(checks, memory, left)
    assert (document["failed"], document["wrong_answers"], document["faults"]) == (0, 0, [])
    assert checks.counts["answers checked, whole"] > 0
    assert checks.counts["swaps"] >= 4
    assert left["sidepath_adapters_resident"] == 0
    assert "| swaps |" in capsys.readouterr().err


@pytest.fixture
def checks() -> Checks:
    """Of two names in two versions each, and the base."""
    library = Library(Path(), Path(), ["a", "b"], versions=2, new=4)
    for folder in ("base", "a-0", "a-1", "b-0", "b-1"):
        library.said[folder, ASKED] = f"{folder} speaks"
    checks = Checks(library, {"a": 1, "b": 2})
    checks.loaded("a", 3, "a-1")
    return checks


def told(checks: Checks, generation: int | None, text: str, **more: Any) -> dict[str, int]:
    """The faults after one answer."""
    before = more.pop("before", Standing("there", 0, 0))
    name, whole = more.pop("name", "a"), more.pop("whole", True)
    checks.answered(Answer(name, ASKED, generation, text, whole), before)
    checks.settle()
    return {kind[7:]: n for kind, n in checks.counts.items() if kind.startswith("fault: ")}


def test_right_answers_are_right(checks: Checks) -> None:
    assert told(checks, 1, "a-0 speaks") == {}
    assert told(checks, 3, "a-1 speaks") == {}
    assert told(checks, 3, "a-1 sp", whole=False) == {}
    assert told(checks, None, "base speaks", name=BASE) == {}
    assert checks.counts["kept a version that was replaced meanwhile"] == 1
    checks.answered(Answer("b", ASKED, 7, "b-1 speaks", True), checks.standing("b"))
    checks.loaded("b", 7, "b-1")  # acknowledged after its first answer
    checks.settle()
    assert checks.failed == 0


@pytest.mark.parametrize(
    ("fault", "generation", "text", "more"),
    [
        ("wrong answer", 1, "a-1 speaks", {}),
        ("wrong answer", 3, "b-0 speaks", {}),
        ("wrong answer", 3, "a-1", {}),
        ("wrong answer", 3, "a-0", {"whole": False}),
        ("wrong answer", 2, "b-0 speaks", {}),
        ("old version", 1, "a-0 speaks", {"before": Standing("there", 1, 3)}),
        ("answered when gone", 3, "a-1 speaks", {"before": Standing("gone", 1, 3)}),
        ("generation", 9, "a-1 speaks", {}),
        ("generation", 3, "base speaks", {"name": BASE}),
    ],
)
def test_wrong_ones_are_found(
    checks: Checks, fault: str, generation: int, text: str, more: dict[str, Any]
) -> None:
    assert told(checks, generation, text, **more) == {fault: 1}


def test_refusals(checks: Checks) -> None:
    checks.missing("a", checks.standing("a"))
    headers = Message()
    checks.reply_failed("x", 503, headers, "")
    checks.reply_failed("x", 500, headers, "")
    headers["Retry-After"] = "1"
    checks.reply_failed("x", 503, headers, "")
    checks.stands("a", "gone")
    checks.missing("a", checks.standing("a"))
    assert checks.failed == 3
    assert checks.counts["503 with Retry-After"] == 1
    assert checks.counts["404 of a name that was gone"] == 1
