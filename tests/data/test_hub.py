from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sidepath
from sidepath.data.hub import HubName, hub_rows, parse_hub_name
from sidepath.errors import DataError
from tests.hub_stand_in import Hub, Repository, serving

NAME = "me/pairs"
OLD, NEW, CUT = "a" * 40, "b" * 40, "d" * 40
READ = """
import json, sys, time
from sidepath.errors import DataError
from sidepath.data.sources import open_source

for line in sys.stdin:
    try:
        rows = [dict(row.fields) for rows in open_source(line.strip()).chunks() for row in rows]
        print(json.dumps({"rows": rows}), flush=True)
    except DataError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""


def lines(count: int, mark: str) -> bytes:
    rows = [{"prompt": f"p{at}", "completion": f"{mark}{at}"} for at in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Reader:
    """A process whose hub is the stand-in, so that the library reads its settings as a user's."""

    def __init__(self, hub: Hub, home: Path) -> None:
        variables = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": str(Path(sidepath.__file__).parents[1]),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", READ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=home,
            env={**os.environ, **variables},
        )

    def read(self, name: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    files = {"train.jsonl": lines(3000, "new"), "test.jsonl": lines(5, "test")}
    commits = {OLD: {"train.jsonl": lines(2, "old")}, NEW: files, CUT: {"a.jsonl": lines(4000, "")}}
    with serving(Hub({f"datasets/{NAME}": Repository(commits, main=NEW)})) as found:
        yield found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home").resolve()


@pytest.fixture(scope="module")
def reader(hub: Hub, home: Path) -> Iterator[Reader]:
    with Reader(hub, home) as process:
        yield process


def test_a_data_set_by_name_revision_and_split(reader: Reader) -> None:
    rows = reader.read(f"hub:{NAME}")["rows"]
    assert len(rows) == 3000
    assert rows[2999] == {"prompt": "p2999", "completion": "new2999"}
    assert len(reader.read(f"hub:{NAME},split=test")["rows"]) == 5
    assert reader.read(f"hub:{NAME}@{OLD}")["rows"][1] == {"prompt": "p1", "completion": "old1"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hub:me/absent", "404"),
        (f"hub:{NAME}@{'c' * 40}", "404"),
        (f"hub:{NAME},split=dev", 'Unknown split "dev"'),
        (f"hub:{NAME},config=big", "'big' not found"),
    ],
)
def test_what_is_not_there(reader: Reader, name: str, says: str) -> None:
    found = reader.read(name)
    assert "cannot be had from the hub" in found["error"]
    assert says in found["error"]


def test_a_cached_commit_does_not_stand_in_for_one_that_is_gone(hub: Hub, reader: Reader) -> None:
    assert len(reader.read(f"hub:{NAME}")["rows"]) == 3000
    commits = hub.repositories[f"datasets/{NAME}"].commits
    gone = commits.pop(NEW)
    assert "cannot be had from the hub" in reader.read(f"hub:{NAME}")["error"]
    commits[NEW] = gone


def test_an_interrupted_download_is_refused_and_leaves_nothing_whole(
    hub: Hub, reader: Reader, home: Path
) -> None:
    before = set(home.rglob("*.arrow"))
    hub.cut = True
    found = reader.read(f"hub:{NAME}@{CUT}")
    hub.cut = False
    assert "cannot be had from the hub" in found["error"]
    assert set(home.rglob("*.arrow")) == before
    assert CUT not in {path.name for path in (home / "datasets").rglob("*")}
    assert len(reader.read(f"hub:{NAME}@{CUT}")["rows"]) == 4000


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hub:a/b", HubName("a/b")),
        ("hub:a/b@refs/pr/1", HubName("a/b", "refs/pr/1")),
        ("hub:a/b,split=test", HubName("a/b", split="test")),
        ("hub:a-1/b.c@v2,split=x,config=y", HubName("a-1/b.c", "v2", "y", "x")),
    ],
)
def test_names(text: str, name: HubName) -> None:
    assert parse_hub_name(text) == name
    assert parse_hub_name(str(name)) == name


@pytest.mark.parametrize(
    "text", ["hub:", "hub:b", "hub:a/b/c", "hub:a/b,test", "hub:a/b,split=", "hub:a/b,x=1"]
)
def test_names_outside_the_grammar(text: str) -> None:
    with pytest.raises(DataError, match="OWNER/NAME"):
        parse_hub_name(text)


def test_a_folder_of_the_same_name_is_not_read_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    (tmp_path / NAME / "train.jsonl").write_bytes(lines(3, "local"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="has the name of the data set"):
        next(hub_rows(HubName(NAME)))
