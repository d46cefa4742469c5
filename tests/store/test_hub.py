"""Adapters and bases by their names on the hub, from a stand-in on the loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import sidepath
from sidepath import LoRA
from sidepath.errors import HubError, StoreError
from sidepath.store import hub as hubs
from sidepath.store.hub import (
    ADAPTER,
    BASE,
    CONFIG,
    HubPlace,
    fetch,
    local,
    name_of,
    parse_place,
    pinned,
    snapshot_of,
)
from sidepath.store.manifest import read_manifest
from tests.conftest import randomise, tiny_llama
from tests.hub_stand_in import Hub, Repository, connected, files_of

OLD, NEW, BASE_AT = "a" * 40, "b" * 40, "c" * 40
FOREIGN = {"adapter_model.bin": b"\x80\x04.", "evil.py": b"1/0", "sub/notes.txt": b"x"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_llama().save_pretrained(folder)  # type: ignore[operator]
    return folder


def save(model: nn.Module, folder: Path) -> dict[str, bytes]:
    adapter = sidepath.inject(model, LoRA(r=2, targets=("q_proj",)), name="a")
    randomise(adapter.parameters())
    adapter.save(folder)
    return files_of(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, bytes]]:
    place = tmp_path_factory.mktemp("adapters")
    return save(tiny_llama(), place / "old"), save(tiny_llama(), place / "new")


@pytest.fixture
def hub(
    tmp_path: Path, base: Path, adapters: tuple[dict[str, bytes], dict[str, bytes]]
) -> Iterator[Hub]:
    hubs._commit.cache_clear()
    old, new = adapters
    commits = {OLD: old, NEW: {**new, **FOREIGN}}
    repositories = {
        "models/me/sql": Repository(commits, NEW, {"v1": OLD}),
        "models/me/tiny": Repository({BASE_AT: {**files_of(base), **FOREIGN}}, BASE_AT),
        "models/me/closed": Repository(commits, NEW, gated=True),
        "models/me/pickled": Repository({NEW: FOREIGN}, NEW),
    }
    with connected(Hub(repositories), tmp_path / "home") as found:
        yield found
    hubs._commit.cache_clear()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hub:a/b", HubPlace("a/b")),
        ("hub:a-1/b.c@refs/pr/1", HubPlace("a-1/b.c", "refs/pr/1")),
        (f"hub:a/b@{OLD}", HubPlace("a/b", OLD)),
    ],
)
def test_names(text: str, place: HubPlace) -> None:
    assert parse_place(text) == place
    assert str(place) == text


@pytest.mark.parametrize(
    "text", ["hub:", "hub:b", "hub:a/b/c", "hub:../b", "hub:a/b@", "hub:a/b@x y", "hub:a--b/c"]
)
def test_names_outside_the_grammar(text: str) -> None:
    with pytest.raises(HubError, match="OWNER/NAME"):
        local(text, ADAPTER)


def test_a_folder_stands_for_itself(tmp_path: Path) -> None:
    assert local(tmp_path, ADAPTER) == tmp_path
    assert pinned(str(tmp_path), ADAPTER) == str(tmp_path)
    assert name_of(tmp_path) == tmp_path.name


def test_nothing_is_saved_under_a_name_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="sidepath push"):
        save(tiny_llama(), Path("hub:me/sql"))
    assert not Path("hub:me").exists()


@pytest.mark.usefixtures("hub")
def test_only_files_that_are_read_are_fetched() -> None:
    adapter, base = fetch(HubPlace("me/sql"), ADAPTER), fetch(HubPlace("me/tiny"), BASE)
    expected = ["README.md", "adapter_config.json", "adapter_model.safetensors", "sidepath.json"]
    assert sorted(path.name for path in adapter.iterdir()) == expected
    expected = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in base.iterdir()) == expected


def test_a_config_alone_is_fetched_for_a_plan(hub: Hub) -> None:
    folder = fetch(HubPlace("me/tiny"), CONFIG)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert not [one for one in hub.served if "model.safetensors" in one]


@pytest.mark.usefixtures("hub")
def test_a_revision_is_pinned_to_its_commit() -> None:
    assert pinned("hub:me/sql", ADAPTER) == f"hub:me/sql@{NEW}"
    assert pinned("hub:me/sql@v1", ADAPTER) == f"hub:me/sql@{OLD}"
    folder = fetch(HubPlace("me/sql", "v1"), ADAPTER)
    assert snapshot_of(folder) == HubPlace("me/sql", OLD)
    assert name_of(folder) == "sql"


def test_a_commit_is_asked_for_once(hub: Hub) -> None:
    folder = local(f"hub:me/sql@{OLD}", ADAPTER)
    asked = len(hub.served)
    assert local(f"hub:me/sql@{OLD}", ADAPTER) == folder
    assert len(hub.served) == asked


@pytest.mark.usefixtures("hub")
def test_adapter_and_base_of_the_hub_are_named_in_what_is_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(local("hub:me/tiny", BASE))
    adapter = sidepath.load(model, "hub:me/sql@v1", allow_other_base=True)
    assert adapter.name == "sql"
    manifest, faults = read_manifest(adapter.save(tmp_path / "again"))
    assert manifest is not None
    assert (manifest.base_name, manifest.base_revision, faults) == ("me/tiny", BASE_AT, [])
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.startswith("---\nbase_model: me/tiny\nbase_model_relation: adapter\n")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_bytes())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", BASE_AT)


@pytest.mark.usefixtures("hub")
def test_a_base_that_transformers_fetched_is_named_too(tmp_path: Path) -> None:
    """By its name alone: transformers no longer keeps the commit; earlier releases did."""
    from transformers import AutoModelForCausalLM

    from sidepath.store.saving import base_name, base_revision

    model = AutoModelForCausalLM.from_pretrained("me/tiny")
    assert base_name(model) == "me/tiny"
    save(model, tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text().startswith("---\nbase_model: me/tiny\n")
    model.config._commit_hash = BASE_AT
    assert base_revision(model) == BASE_AT


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hub:me/absent", "no such repository, or it is private"),
        ("hub:me/sql@v9", "no such revision"),
        ("hub:me/closed", "gated"),
        ("hub:me/pickled", "never loaded"),
        ("hub:me/tiny", "holds no adapter"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_cannot_be_had(name: str, says: str) -> None:
    with pytest.raises(HubError, match=says) as error:
        local(name, ADAPTER)
    assert name in str(error.value)
    assert error.value.hint is not None or name == "hub:me/tiny"


def test_a_refusal_without_a_reason(hub: Hub) -> None:
    hub.refuse["/resolve/"] = 403
    with pytest.raises(HubError, match="refused access"):
        local("hub:me/sql", ADAPTER)


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = local("hub:me/sql", ADAPTER)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE=1"):
        local("hub:me/sql", ADAPTER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.served)
    assert local("hub:me/sql", ADAPTER) == folder
    with pytest.raises(HubError, match="cannot be fetched"):
        local("hub:me/sql@v1", ADAPTER)
    assert len(hub.served) == asked


def test_a_cached_commit_does_not_stand_in_for_one_that_is_gone(hub: Hub) -> None:
    local("hub:me/sql", ADAPTER)
    del hub.repositories["models/me/sql"]
    with pytest.raises(HubError, match="no such repository"):
        local("hub:me/sql", ADAPTER)


@pytest.mark.usefixtures("hub")
def test_an_interrupted_download_is_not_taken_for_whole(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.cut = True
    with pytest.raises(HubError, match="what has come is kept"):
        local("hub:me/sql", ADAPTER)
    hub.cut = False
    sidepath.load(tiny_llama(), "hub:me/sql")


def test_in_a_process_in_which_nothing_else_loaded_the_library(tmp_path: Path) -> None:
    code = "from sidepath.store.hub import *; local('hub:me/sql', ADAPTER)"
    variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables, "PYTHONPATH": str(Path(sidepath.__file__).parents[1])},
    )
    assert "HubError: the repository cannot be fetched from the hub" in ran.stderr
    assert "cached snapshot" in ran.stderr


def test_a_full_disk(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(exist_ok=True)
    shutil.rmtree(tmp_path / "home" / "hub", ignore_errors=True)
    (tmp_path / "home" / "hub").write_text("in the way")
    with pytest.raises(HubError, match="free space or check permissions"):
        local("hub:me/sql", ADAPTER)
    assert hub.served
