"""A real `sidepath serve --replicas 2` over the embedded base; skipped where Ray is not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sidepath.serve.keys import Key, add_key
from tests.serve.kit import Alone, embedded, save_adapters
from tests.serve.sockets import Said, ask

ADAPTERS = 4
PROMPT = "The capital of France"
PATIENCE = 240
"""Seconds for Ray to start, or to start a replica anew, on a busy machine."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of it is a target of its own."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.scale)


def descendants(root: int) -> dict[int, str]:
    """The processes that one has started, and theirs, with their command lines."""
    parents, said = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            stat = (place / "stat").read_text().rpartition(")")[2].split()
            words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue
        if stat[0] != "Z":
            parents[int(place.name)], said[int(place.name)] = int(stat[1]), words
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: said[pid] for pid in found - {root}}


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


class Scaled:
    """The server, and what it is asked."""

    def __init__(self, process: subprocess.Popen[str], url: str, admin: str) -> None:
        self.process, self.url, self.admin = process, url, admin
        self.port = int(url.rsplit(":", 1)[1].partition("/")[0])

    def complete(self, model: str, tokens: int = 8, **more: Any) -> Said:
        body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, **more}
        return ask(self.port, "/v1/completions", body, key=self.admin)

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        """Each sample: its name, its labels, its value."""
        time.sleep(1.1)  # what is told may be a second old
        text = ask(self.port, "/metrics", key=self.admin).text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return [
            (name.partition("{")[0], dict(re.findall(r'(\w+)="([^"]*)"', name)), float(value))
            for name, _, value in lines
        ]

    def total(self, name: str) -> float:
        return sum(value for found, _, value in self.metrics() if found == name)

    def answered(self) -> dict[str, Counter[str]]:
        """Of each model, how many requests each replica has answered."""
        found: dict[str, Counter[str]] = {}
        for name, labels, value in self.metrics():
            if name == "sidepath_requests_total" and value:
                found.setdefault(labels["model"], Counter())[labels["replica"]] += int(value)
        return found

    def replicas(self) -> list[int]:
        """The process of each replica."""
        every = descendants(self.process.pid).items()
        return sorted(pid for pid, said in every if said.startswith("ray::ServeReplica"))

    def wait_for(self, count: int) -> None:
        """Until so many replicas answer."""
        end = time.monotonic() + PATIENCE
        while self.total("sidepath_replicas") != count:
            assert time.monotonic() < end


@contextmanager
def serving(*flags: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command's process, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sidepath", "serve", "--json", "--port", "0", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    said = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"with \d+ replicas at (\S+)", line):
                yield process, found[1]
                break
        else:
            pytest.fail("".join(said))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
        print(out, *said, err)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_adapters(embedded, tmp_path_factory.mktemp("scale"), ADAPTERS)


@pytest.fixture(scope="session")
def greedy(folders: list[Path]) -> Any:
    """The greedy text of a model, by `generate` with its adapter alone."""
    from transformers import AutoTokenizer

    import sidepath

    tokenizer = AutoTokenizer.from_pretrained(sidepath.embedded_base())
    alone, prompt = Alone(embedded, folders), tuple(tokenizer(PROMPT)["input_ids"])
    before = tokenizer.decode(prompt, skip_special_tokens=True)

    def text(model: str, tokens: int = 8) -> str:
        number = None if model == "base" else int(model.rpartition("-")[2])
        found = alone.tokens(number, prompt, tokens)
        whole: str = tokenizer.decode([*prompt, *found], skip_special_tokens=True)
        return whole[len(before) :]

    return text


@pytest.fixture(scope="module")
def scaled(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scaled]:
    pytest.importorskip("ray", reason="Ray is not installed: `make test-scale` brings it")
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    admin = add_key(keys, Key(name="operator", admin=True))
    root = folders[0].parent
    flags = ("--adapters", root, "--name", "base", "--keys", keys, "--allow-loading", root)
    with serving(*flags, "--replicas", 2) as (process, url):
        yield Scaled(process, url, admin)


def texts(said: Said) -> list[str]:
    """The text of each event of a stream that has one."""
    events = [json.loads(part[6:]) for part in said.text.strip().split("\n\n")[:-1]]
    return [each["choices"][0]["text"] for each in events if "choices" in each]
