"""Uploading an adapter to a stand-in for the hub: what is sent, refused and checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import sidepath
from sidepath import LoRA
from sidepath.errors import ConfigError, DamagedAdapter, HubError, SidepathError, StoreError
from sidepath.store import hub as hubs
from sidepath.store.manifest import read_manifest
from sidepath.store.peft_format import WEIGHTS
from sidepath.store.pushing import push
from tests.conftest import randomise, tiny_llama
from tests.faults import flip_bit
from tests.hub_stand_in import Hub, Repository, connected

FIRST = "e" * 40
# What httpx says of how huggingface_hub sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapter = sidepath.inject(tiny_llama(), LoRA(r=2, targets=("q_proj",)), name="sql")
    randomise(adapter.parameters())
    record = {"data": {"name": "hub:me/pairs@v1,split=train", "digest": "d1f"}, "seed": 3}
    files = {"settings.toml": "[lora]\nr = 2\n"}
    folder = tmp_path_factory.mktemp("adapters") / "sql"
    return adapter.save(folder, metrics={"loss": 1.25}, record=record, files=files)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "sql"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hubs._commit.cache_clear()
    taken = Repository({FIRST: {"LICENSE": b"ours", "README.md": b"old"}}, FIRST)
    with connected(Hub({"models/me/taken": taken}), tmp_path / "home", token="hf_secret") as found:
        yield found


def written(hub: Hub) -> list[str]:
    return [one for one in hub.served if one.startswith(("POST", "PUT"))]


def test_what_is_pushed_loads_again_bit_for_bit(hub: Hub, folder: Path) -> None:
    found = push(folder, "hub:me/sql", private=True, message="first")
    repository = hub.repositories["models/me/sql"]
    assert repository.private
    assert repository.main == found.place.revision
    assert found.url.endswith(f"/me/sql/commit/{found.place.revision}")
    assert set(found.files) == {path.name for path in folder.iterdir()}
    one, other = tiny_llama(), tiny_llama()
    sidepath.load(one, folder)
    assert sidepath.load(other, "hub:me/sql").name == "sql"
    tensors = dict(other.named_parameters())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in one.named_parameters())


def test_the_card_tells_what_the_hub_and_people_ask_for(hub: Hub, folder: Path) -> None:
    push(folder, "hub:me/sql", licence="apache-2.0")
    repository = hub.repositories["models/me/sql"]
    card = repository.commits[repository.main]["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "datasets": ["me/pairs"],
        "tags": ["lora", "sidepath"],
    }
    assert "| loss | 1.25 |" in card
    assert "d1f" in card
    assert 'sidepath.load(model, "hub:me/sql", name="sql")' in card
    manifest, faults = read_manifest(hubs.fetch(hubs.HubPlace("me/sql"), hubs.ADAPTER))
    assert faults == []
    assert manifest is not None
    assert manifest.record["licence"] == "apache-2.0"
    assert manifest.base.id in card


def parity_file(place: Path, digest: str) -> Path:
    measured = {"max_abs": 1e-6, "mean_abs": 1e-7, "top1": 1.0, "kl": 0.0, "tolerance": 1e-4,
                "mean_tolerance": 1e-5, "effect": 0.5, "positions": 60}  # fmt: skip
    adapters = [{"name": "sql", "digest": digest}]
    place.mkdir()
    (place / "parity.json").write_text(json.dumps({**measured, "adapters": adapters}))
    return place


def test_the_parity_of_a_merge_goes_onto_the_card(hub: Hub, folder: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    push(folder, "hub:me/sql", parity=parity_file(tmp_path / "merged", digest))
    repository = hub.repositories["models/me/sql"]
    card = repository.commits[repository.main]["README.md"].decode()
    assert "| largest difference of two outputs | 1e-06 |" in card


@pytest.mark.usefixtures("hub")
def test_a_parity_of_another_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="another adapter"):
        push(folder, "hub:me/sql", parity=parity_file(tmp_path / "merged", "0" * 64))


def test_a_branch_of_a_repository_that_has_other_files(hub: Hub, folder: Path) -> None:
    found = push(folder, "hub:me/taken@next")
    repository = hub.repositories["models/me/taken"]
    assert repository.main == FIRST
    assert repository.branches == {"next": found.place.revision}
    files = repository.commits[str(found.place.revision)]
    assert files["LICENSE"] == b"ours"
    assert files["README.md"] != b"old"


def test_the_folder_is_not_changed(hub: Hub, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    push(folder, "hub:me/sql", licence="mit")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert written(hub)


def damaged(folder: Path) -> None:
    flip_bit(folder / WEIGHTS)


def foreign(folder: Path) -> None:
    (folder / "notes.txt").write_text("private")


def nested(folder: Path) -> None:
    (folder / "runs").mkdir()


def without_manifest(folder: Path) -> None:
    (folder / "sidepath.json").unlink()


def linked(folder: Path) -> None:
    (folder / "settings.toml").rename(folder.parent / "settings.toml")
    (folder / "settings.toml").symlink_to(folder.parent / "settings.toml")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (damaged, "not those that were saved"),
        (foreign, "notes.txt"),
        (nested, "runs"),
        (without_manifest, "nothing says what it should hold"),
        (linked, "leads out of its folder"),
        (shutil.rmtree, "no such adapter folder"),
    ],
)
def test_nothing_is_sent_of_a_folder_that_is_not_what_was_saved(
    hub: Hub, folder: Path, harm: object, says: str
) -> None:
    harm(folder)  # type: ignore[operator]
    with pytest.raises(SidepathError, match=says):
        push(folder, "hub:me/sql")
    assert hub.served == []


@pytest.mark.parametrize("name", ["run.py", "old.pt"])
def test_a_file_that_nobody_would_fetch_is_not_sent(hub: Hub, tmp_path: Path, name: str) -> None:
    adapter = sidepath.inject(tiny_llama(), LoRA(r=2, targets=("q_proj",)), name="sql")
    adapter.save(tmp_path / "sql", files={name: "x"})
    with pytest.raises(StoreError, match=name):
        push(tmp_path / "sql", "hub:me/sql")
    assert hub.served == []


@pytest.mark.parametrize(
    ("target", "licence"), [("me/sql", None), ("folder", None), ("hub:me/sql", "Do What You Like")]
)
@pytest.mark.usefixtures("hub")
def test_impossible_targets_and_licences(folder: Path, target: str, licence: str | None) -> None:
    with pytest.raises(ConfigError):
        push(folder, target, licence=licence)


def test_without_a_login(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="hf auth login"):
        push(folder, "hub:me/sql")
    assert "models/me/sql" not in hub.repositories


def test_what_arrived_changed_is_found(hub: Hub, folder: Path) -> None:
    hub.spoil = True
    with pytest.raises(HubError, match="does not hold what was sent") as error:
        push(folder, "hub:me/sql")
    assert error.value.faults == [f"{WEIGHTS}: another content"]


def test_a_hub_that_fails_in_the_middle(hub: Hub, folder: Path) -> None:
    hub.refuse["/commit/"] = 500
    with pytest.raises(HubError, match="cannot be written to the hub"):
        push(folder, "hub:me/taken")
    assert hub.repositories["models/me/taken"].main == FIRST


def test_a_changed_file_between_check_and_copy(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def meddled(source: Path, target: Path) -> None:
        copy(source, target)
        if source.name == WEIGHTS:
            flip_bit(target)

    monkeypatch.setattr(shutil, "copyfile", meddled)
    with pytest.raises(DamagedAdapter, match="changed while it was read"):
        push(folder, "hub:me/sql")
    assert hub.served == []
