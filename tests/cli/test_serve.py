"""The verb serve: a process that is asked, told to end, and ends well; and what it refuses."""

from __future__ import annotations

import json
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from sidepath.cli.serving import folders_in
from sidepath.errors import StoreError

from .conftest import Run
from .serving import serving


def ask(url: str, model: str) -> Any:
    body = {"model": model, "prompt": "count 3:", "max_tokens": 4, "temperature": 0}
    sent = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(sent, timeout=60) as reply:
        return json.load(reply)


@contextmanager
def begun(url: str, model: str) -> Iterator[Iterator[bytes]]:
    """Eight long answers, streamed, of which the first line has come."""
    body = {"model": model, "prompt": "count 3:", "max_tokens": 100, "n": 8, "stream": True}
    sent = urllib.request.Request(f"{url}/completions", json.dumps(body).encode())
    with urllib.request.urlopen(sent, timeout=60) as reply:
        yield chain([reply.readline()], reply)


def test_a_server_answers_and_ends_on_sigterm(tiny_base: Path, trained: Path) -> None:
    """What was begun by then is answered to its end."""
    flags = ("--name", "tiny-base", "--base", tiny_base, "--adapters", trained.parent)
    with serving(*flags) as server:
        assert server.said.startswith("serving tiny-base and 1 adapters at ")
        assert ask(server.url, "tiny-base")["model"] == "tiny-base"
        assert ask(server.url, trained.name)["usage"]["completion_tokens"] >= 1
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(server.url, "other")
        assert error.value.code == 404
        error.value.close()
        with begun(server.url, "tiny-base") as lines:
            server.end()
            events = [line for line in lines if line.strip()]
    assert events[-1] == b"data: [DONE]\n"
    finishes = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in events[:-1]]
    assert len([finish for finish in finishes if finish]) == 8
    assert sum(json.loads(server.out)["ended"].values()) == 2 + 8


def test_what_cannot_be_served(
    run: Run, tiny_base: Path, other_base: Path, trained: Path, tmp_path: Path
) -> None:
    def refused(*more: object) -> str:
        ran = run("serve", "--base", tiny_base, "--port", "0", *more)
        assert (ran.code, ran.out) == (2, "")
        assert "Traceback" not in ran.err
        return ran.err

    assert "no such folder of adapters" in refused("--adapters", tmp_path / "none")
    assert "the folder holds no adapter" in refused("--adapters", tmp_path)
    own = refused("--adapters", trained, "--name", trained.name)
    assert "give the base another name with --name" in own
    shutil.copytree(trained, tmp_path / "good")
    shutil.copytree(trained, tmp_path / "bad name")
    shutil.copytree(trained, tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"x")
    both = refused("--adapters", tmp_path)
    assert "2 of 3 adapters cannot be served" in both
    assert "bad name" in both
    assert "damaged" in both
    ran = run("serve", "--base", other_base, "--port", "0", "--adapters", trained)
    assert ran.code == 2
    assert "the adapter was made for another base" in ran.err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = run("serve", "--base", tiny_base, "--port", taken.getsockname()[1])
    assert busy.code == 2
    assert "--port 0 takes a free one" in busy.err


def test_a_save_in_progress_is_no_adapter(trained: Path, tmp_path: Path) -> None:
    for name in ("good", ".good.sidepath-0123abcd.new"):
        shutil.copytree(trained, tmp_path / name)
    assert folders_in(str(tmp_path), "base") == {"good": tmp_path / "good"}


def test_links_to_two_adapters_of_one_name(trained: Path, tmp_path: Path) -> None:
    """One of them would be served in the other's place."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for place in ("one", "two"):
        shutil.copytree(trained, tmp_path / place / "sql")
        (shelf / place).symlink_to(tmp_path / place / "sql")
    with pytest.raises(StoreError, match="one name") as error:
        folders_in(str(shelf), "base")
    assert "shelf/one" in error.value.faults[0]
    assert "shelf/two: sql" in error.value.faults[0]
