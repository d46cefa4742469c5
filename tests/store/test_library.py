"""A folder of adapters as a library: cheap to list, safe to open, damage told and not fatal."""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sidepath
from sidepath import BitFit, Library, LoRA
from sidepath.errors import BadName, StoreError, UnknownAdapter, WrongBase
from sidepath.methods.base import Method
from sidepath.store.fingerprint import fingerprint
from sidepath.store.library import Damaged
from sidepath.store.manifest import read_manifest
from sidepath.store.peft_format import CONFIG, WEIGHTS
from tests.conftest import outputs, randomise, tiny_gpt2, tiny_llama
from tests.faults import flip_bit

IDS = torch.randint(3, 64, (2, 5))


def save(model: nn.Module, folder: Path, config: Method, **metrics: float) -> Path:
    adapter = sidepath.inject(model, config, name=folder.name)
    randomise(adapter.parameters())
    adapter.save(folder, metrics=metrics or None)
    sidepath.remove(model, folder.name)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("library")
    save(tiny_llama(), place / "sql", LoRA(r=4, targets=("q_proj",)), loss=0.5)
    save(tiny_llama(), place / "legal", LoRA(r=2, targets=("q_proj", "v_proj")))
    save(tiny_gpt2(), place / "other", BitFit())
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "library"))


def test_what_is_listed(place: Path) -> None:
    library = Library(place)
    assert list(library) == ["legal", "other", "sql"]
    sql = library["sql"]
    manifest, _ = read_manifest(place / "sql")
    assert manifest is not None
    assert (sql.method, sql.rank, dict(sql.metrics)) == ("lora", 4, {"loss": 0.5})
    assert sql.digest == hashlib.sha256((place / "sql" / WEIGHTS).read_bytes()).hexdigest()
    assert sql.size == sum(path.stat().st_size for path in (place / "sql").iterdir())
    assert sql.numbers == 2 * 4 * (32 + 32)
    assert sql.fingerprint == manifest.base.id
    assert library["other"].rank is None
    assert (library.damaged, library.others) == ([], [])


def test_search_by_base_and_method(place: Path, tmp_path: Path) -> None:
    library = Library(place)
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    for base in (model, fingerprint(model), tmp_path / "base", fingerprint(model).id):
        assert [entry.name for entry in library.search(base)] == ["legal", "sql"]
    assert [entry.name for entry in library.search(tiny_gpt2())] == ["other"]
    assert [entry.name for entry in library.search(method="bitfit")] == ["other"]
    assert library.search(model, method="bitfit") == []
    assert len(library.search()) == 3


def test_the_base_is_found_in_another_data_type(place: Path) -> None:
    half = tiny_llama().to(torch.bfloat16)
    assert fingerprint(half).id != Library(place)["sql"].fingerprint
    assert [entry.name for entry in Library(place).search(half)] == ["legal", "sql"]


def test_loading_from_it(place: Path) -> None:
    one, other = tiny_llama(), tiny_llama()
    adapter = Library(place).load(one, "sql", as_name="mine")
    sidepath.load(other, place / "sql")
    assert adapter.name == "mine"
    assert torch.equal(outputs(one, IDS), outputs(other, IDS))
    another = tiny_llama()
    randomise(another.parameters())
    with pytest.raises(WrongBase):
        Library(place).load(another, "sql")


def test_damage_is_told_beside_the_sound_ones(place: Path, tmp_path: Path) -> None:
    for name in ("truncated", "flipped", "unlisted"):
        shutil.copytree(place / "sql", place / name)
    weights = place / "truncated" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-8])
    flip_bit(place / "flipped" / "sidepath.json")
    (place / "unlisted" / WEIGHTS).unlink()
    (place / "link").symlink_to(place / "sql")
    shutil.copytree(place / "sql", tmp_path / "elsewhere")
    (place / "reaching").mkdir()
    for name in (WEIGHTS, "sidepath.json"):
        (place / "reaching" / name).symlink_to(tmp_path / "elsewhere" / name)
    (place / "empty").mkdir()
    (place / ".sql.sidepath-0a0a0a0a.new").mkdir()
    (place / "notes.txt").write_text("x")
    library = Library(place)
    assert list(library) == ["legal", "other", "sql"]
    found = {one.name: one.fault for one in library.damaged}
    assert sorted(found) == ["flipped", "link", "reaching", "truncated", "unlisted"]
    assert "not those that were saved" in found["flipped"]
    assert Damaged("link", "a link: not followed") in library.damaged
    assert "leads out of its folder" in found["reaching"]
    assert all("\n" not in fault for fault in found.values())
    assert library.others == ["empty", "notes.txt"]
    with pytest.raises(UnknownAdapter, match='"truncated" is damaged'):
        library.load(tiny_llama(), "truncated")


@pytest.mark.parametrize("name", ["../library/sql", "sql/../sql", "..", ".", "", "/etc", "link"])
def test_no_name_leads_out_of_it(place: Path, name: str) -> None:
    (place / "link").symlink_to(place / "sql")
    model = tiny_llama()
    before = list(model.state_dict())
    with pytest.raises(UnknownAdapter):
        Library(place).load(model, name)
    assert list(model.state_dict()) == before


def test_weights_that_changed_are_listed_and_refused_when_loaded(place: Path) -> None:
    flip_bit(place / "sql" / WEIGHTS)
    library = Library(place)
    assert "sql" in library
    with pytest.raises(StoreError, match="not those that were saved"):
        library.load(tiny_llama(), "sql")


def test_a_name_that_is_taken_or_impossible(place: Path) -> None:
    (place / "sql").rename(place / "my sql")
    library = Library(place)
    with pytest.raises(BadName):
        library.load(tiny_llama(), "my sql")
    assert library.load(tiny_llama(), "my sql", as_name="sql").name == "sql"
    with pytest.raises(UnknownAdapter, match="legal"):
        library["legall"]


def test_folders_of_pefts(place: Path) -> None:
    (place / "sql" / "sidepath.json").unlink()
    (place / "sql" / "README.md").unlink()
    entry = Library(place)["sql"]
    assert (entry.rank, entry.fingerprint, entry.digest) == (4, None, None)
    assert entry.size == sum((place / "sql" / name).stat().st_size for name in (WEIGHTS, CONFIG))
    (place / "sql" / CONFIG).write_text("{")
    assert [one.name for one in Library(place).damaged] == ["sql"]


@pytest.mark.parametrize("wrong", ["missing", "sql"])
def test_what_is_no_library(place: Path, wrong: str) -> None:
    with pytest.raises(StoreError, match="folder"):
        Library(place / wrong)


def test_a_thousand_adapters_cost_two_files_each(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest, and the head of the weights: whatever else is there, and however large."""
    for number in range(1000):
        shutil.copytree(place / "sql", tmp_path / "many" / f"a{number}", copy_function=os.link)
    opened: Counter[str] = Counter()
    read = Counter[str]()

    class Counted(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            read[os.path.basename(str(self.name))] += len(data)
            return data

        readall = lambda self: self.read(os.fstat(self.fileno()).st_size)  # noqa: E731

    real = io.open

    def counted(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        opened[os.path.basename(os.fspath(file))] += 1
        return Counted(file) if mode == "rb" else real(file, mode, *rest, **named)

    monkeypatch.setattr(builtins, "open", counted)
    monkeypatch.setattr(io, "open", counted)
    library = Library(tmp_path / "many")
    monkeypatch.undo()
    assert len(library) == 1000
    assert opened == {"sidepath.json": 1000, WEIGHTS: 1000}
    header = 8 + int.from_bytes((place / "sql" / WEIGHTS).read_bytes()[:8], "little")
    assert read[WEIGHTS] == 1000 * header


def test_a_folder_that_may_not_be_read_is_damaged(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others are listed all the same."""
    listed = os.listdir

    def refusing(path: Any) -> list[str]:
        if str(path) == str(place / "legal"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refusing)
    library = Library(place)
    assert list(library) == ["other", "sql"]
    assert [one.name for one in library.damaged] == ["legal"]
    assert "Permission denied" in library.damaged[0].fault
