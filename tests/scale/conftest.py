"""A real `sidepath serve --replicas 2` over the embedded base; skipped where Ray is not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
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


def listening(pids: Iterable[int]) -> set[int]:
    """The TCP ports that processes listen on, at whatever address."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in inodes:
                found.add(int(local.rpartition(":")[2], 16))
    return found


def resident(pids: Iterable[int]) -> int:
    """Bytes that processes have in memory; what several share is counted once, in parts."""
    found = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        found += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found


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


@pytest.fixture(scope="session", autouse=True)
def _ray() -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: `make test-scale` brings it")


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
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    admin = add_key(keys, Key(name="operator", admin=True))
    root = folders[0].parent
    flags = ("--adapters", root, "--name", "base", "--keys", keys, "--allow-loading", root)
    begun = time.monotonic()
    with serving(*flags, "--replicas", 2) as (process, url):
        every = [process.pid, *descendants(process.pid)]
        print(f"{time.monotonic() - begun:.0f} s to start, {resident(every) / 2**20:,.0f} MiB")
        yield Scaled(process, url, admin)


def texts(said: Said) -> list[str]:
    """The text of each event of a stream that has one."""
    events = [json.loads(part[6:]) for part in said.text.strip().split("\n\n")[:-1]]
    return [each["choices"][0]["text"] for each in events if "choices" in each]
