"""Which folders may be loaded: paths, links, sizes, ranks, kinds of files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sidepath.errors import RequestRefused, StoreError
from sidepath.serve.confined import MOST_FILES, Loading
from tests.conftest import tiny_llama
from tests.serve.kit import save_adapters


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(tiny_llama, tmp_path_factory.mktemp("saved"), 1)[0]


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A root with an adapter in it, one deeper, and one beside it."""
    for place in ("root/sql", "root/team/legal", "beside"):
        shutil.copytree(saved, tmp_path / place)
    return tmp_path / "root"


def test_folders_below_the_root(root: Path) -> None:
    loading = Loading(root)
    assert loading.folder("sql") == root / "sql"
    assert loading.folder("team/legal/") == root / "team" / "legal"
    assert loading.folder("./sql") == root / "sql"
    assert loading.folder(str(root / "sql")) == root / "sql"


def test_a_root_that_is_a_link_is_where_it_leads(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    loading = Loading(tmp_path / "link")
    assert loading.folder("sql") == root / "sql"
    assert loading.folder(str(tmp_path / "link" / "sql")) == root / "sql"


@pytest.mark.parametrize(
    "given",
    [
        "",
        ".",
        "/",
        "..",
        "../beside",
        "sql/../../beside",
        "sql/..",
        "sql/../sql",
        "/etc",
        "{root}",
        "{root}/",
        "{root}/../beside",
        "{root}beside",
        "{beside}",
        "hub:owner/name",
        "~/beside",
        "sql\0",
        "x" * 300,
        "x/" * 3000,
        "\ud800",
        "linked",
        "inner",
        "team/up/beside",
        "loop",
    ],
)
def test_no_way_leads_out(root: Path, tmp_path: Path, given: str) -> None:
    (root / "linked").symlink_to(tmp_path / "beside")
    (root / "inner").symlink_to(root / "sql")
    (root / "team" / "up").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    said = given.format(root=root, beside=tmp_path / "beside")
    with pytest.raises((RequestRefused, StoreError), match=r"does not lead|no adapter folder"):
        Loading(root).folder(said)


def test_links_within_the_folder(root: Path, tmp_path: Path) -> None:
    weights = root / "sql" / "adapter_model.safetensors"
    outside = tmp_path / "beside" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(outside)
    (root / "sql" / "more").symlink_to(tmp_path)
    with pytest.raises(RequestRefused) as error:
        Loading(root).folder("sql")
    assert sorted(error.value.faults) == ["adapter_model.safetensors is a link", "more is a link"]


def test_what_is_no_file(root: Path) -> None:
    os.mkfifo(root / "sql" / "pipe")
    with pytest.raises(RequestRefused, match="pipe is neither a file nor a folder"):
        Loading(root).folder("sql")


def test_pickles_and_empty_folders(root: Path) -> None:
    weights = root / "sql" / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(StoreError, match="pickle files are never loaded"):
        Loading(root).folder("sql")
    (root / "empty").mkdir()
    with pytest.raises(StoreError, match="holds no adapter"):
        Loading(root).folder("empty")
    with pytest.raises(StoreError, match="no adapter folder"):
        Loading(root).folder("none")


def test_size_rank_and_number(root: Path, saved: Path) -> None:
    size = sum(path.stat().st_size for path in saved.iterdir())
    Loading(root, max_bytes=size).folder("sql")
    with pytest.raises(RequestRefused, match=f"{size:,} bytes, at most {size - 1:,}"):
        Loading(root, max_bytes=size - 1).folder("sql")
    Loading(root, max_rank=2).folder("sql")
    with pytest.raises(RequestRefused, match="rank 2, at most 1"):
        Loading(root, max_rank=1).folder("sql")
    for number in range(MOST_FILES):
        (root / "sql" / f"{number}.txt").touch()
    with pytest.raises(RequestRefused, match=f"more than {MOST_FILES} files"):
        Loading(root).folder("sql")


def test_a_header_that_only_says_that_it_is_large(root: Path) -> None:
    """Ranks are read off the header: no tensor is."""
    place = root / "wide"
    place.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4096, 1)}, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps({"r": 4096}))
    with pytest.raises(RequestRefused, match="rank 4096, at most 256"):
        Loading(root).folder("wide")
