"""Names on the hub wherever a folder is taken; the verbs push and library."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidepath.store import hub as hubs
from tests.faults import flip_bit
from tests.hub_stand_in import Hub, Repository, connected, files_of

from .conftest import Run

BASE, ADAPTER = "b" * 40, "a" * 40
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, tiny_base: Path, trained: Path) -> Iterator[Hub]:
    hubs._commit.cache_clear()
    repositories = {
        "models/me/tiny": Repository({BASE: files_of(tiny_base)}, BASE),
        "models/me/counting": Repository({ADAPTER: files_of(trained)}, ADAPTER, {"v1": ADAPTER}),
    }
    with connected(Hub(repositories), tmp_path / "home", token="hf_secret") as found:
        yield found


@pytest.mark.usefixtures("hub")
def test_a_run_on_a_base_of_the_hub_names_its_commit(run: Run, pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = f"--data {pairs} --output {output} --steps 1 --r 1 --no-forgetting"
    ran = run("train", "--base", "hub:me/tiny", *flags.split())
    assert ran.code == 0, ran.err
    assert f"hub:me/tiny is hub:me/tiny@{BASE}" in ran.err
    settings = tomllib.loads((output / "settings.toml").read_text())
    assert settings["run"]["base"] == f"hub:me/tiny@{BASE}"
    base = json.loads((output / "sidepath.json").read_bytes())["base"]
    assert (base["name"], base["revision"]) == ("me/tiny", BASE)
    again = run("eval", "--base", settings["run"]["base"], "--adapter", output, "--data", pairs)
    assert again.code == 0, again.err


@pytest.mark.usefixtures("hub")
def test_every_verb_takes_both(run: Run, pairs: Path, tmp_path: Path) -> None:
    base, adapter = "hub:me/tiny", "hub:me/counting@v1"
    merged = tmp_path / "merged"
    for words in (
        ["plan", base],
        ["generate", "--base", base, "--adapter", adapter, "--prompt", "count 1:"],
        ["eval", "--base", base, "--adapter", adapter, "--data", pairs],
        ["inspect", adapter, "--base", base],
        ["inspect", adapter, "hub:me/counting"],
        ["merge", base, adapter, merged],
    ):
        ran = run(*words, "--json")
        assert ran.code == 0, ran.err
    assert run("inspect", adapter, "--json").document["adapter"] == "counting"
    parity = json.loads((merged / "parity.json").read_bytes())
    assert parity["adapters"][0]["name"] == "counting"
    assert parity["adapters"][0]["hub"] == f"hub:me/counting@{ADAPTER}"
    assert (parity["base"]["name"], parity["base"]["hub"]) == ("tiny", f"hub:me/tiny@{BASE}")


def test_a_plan_reads_the_config_alone(run: Run, hub: Hub) -> None:
    assert run("plan", "hub:me/tiny").code == 0
    assert {one.rpartition("/")[2] for one in hub.served if "/resolve/" in one} == {"config.json"}


def test_config_fetches_nothing(run: Run, hub: Hub) -> None:
    ran = run("config", "--base", "hub:me/absent", "--json")
    assert ran.document["run"]["base"]["value"] == "hub:me/absent"
    assert hub.served == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("plan hub:me/absent", "no such repository"),
        ("inspect hub:me/counting@v2", "no such revision"),
        ("generate --prompt a --adapter hub:me/tiny", "holds no adapter"),
        ("eval --data x.jsonl --base hub:me", "OWNER/NAME"),
        ("merge hub:me/tiny hub:me/counting hub:me/merged", "sidepath push"),
        ("push hub:me/absent hub:me/copy", "no such repository"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_refused_with_one_message(run: Run, words: str, says: str) -> None:
    ran = run(*words.split())
    assert ran.code == 2, ran.err
    assert says in ran.err
    assert len([line for line in ran.err.splitlines() if line.startswith("sidepath")]) == 1
    assert "Traceback" not in ran.err


def test_push_and_fetch(run: Run, hub: Hub, adapter: Path, tiny_base: Path) -> None:
    ran = run("push", adapter, "hub:me/new", "--private", "--licence", "mit", "--json")
    assert ran.code == 0, ran.err
    commit = hub.repositories["models/me/new"].main
    assert ran.document["place"] == f"hub:me/new@{commit}"
    assert "sidepath.json" in ran.document["files"]
    answered = run("generate", "--base", tiny_base, "--adapter", "hub:me/new", "--prompt", "a")
    assert answered.code == 0, answered.err


def test_push_of_a_damaged_folder_sends_nothing(run: Run, hub: Hub, adapter: Path) -> None:
    flip_bit(adapter / "adapter_model.safetensors")
    ran = run("push", adapter, "hub:me/new")
    assert ran.code == 2
    assert "nothing was sent" in ran.err
    assert hub.served == []


def test_library(run: Run, adapter: Path, tiny_base: Path, other_base: Path) -> None:
    shutil.copytree(adapter, adapter.parent / "spoilt")
    flip_bit(adapter.parent / "spoilt" / "sidepath.json")
    ran = run("library", adapter.parent, "--json")
    assert ran.code == 0, ran.err
    (entry,) = ran.document["adapters"]
    assert (entry["name"], entry["method"], entry["rank"]) == ("adapter", "lora", 2)
    assert [one["name"] for one in ran.document["damaged"]] == ["spoilt"]
    assert "1 of 1 adapters, 1 damaged" in run("library", adapter.parent).out
    for base, count in ((tiny_base, 1), (other_base, 0), (entry["fingerprint"], 1)):
        found = run("library", adapter.parent, "--base", base, "--json").document
        assert len(found["adapters"]) == count
    assert run("library", adapter).code == 2
