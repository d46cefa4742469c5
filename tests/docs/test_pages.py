"""Every code block of the documentation is run, or checked where nothing here could run it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidepath.errors import ConfigError
from sidepath.injection.architecture import FUSED
from sidepath.methods import METHODS
from tests.documents import (
    LOOKED_AT,
    Block,
    Reader,
    blocks_of,
    checked,
    furnish,
    furnish_adapters,
    ours,
    pages,
    parsed,
)

PAGES = pages()
RUN = [
    name
    for name, path in PAGES.items()
    if any(block.lacking is None and block.language not in LOOKED_AT for block in blocks_of(path))
]
"""Pages with something to run."""
NOT_RUN = {
    "a GPU": 1,
    "a minute": 1,
    "a server": 5,
    "an empty machine": 4,
    "llama.cpp": 1,
    "Ollama": 1,
    "several GPUs": 2,
    "the hub": 1,
    "vLLM": 1,
}
"""Blocks that are not run, by what they need. A new one is a decision: count it here."""


def test_what_is_not_run_is_counted() -> None:
    lacking = [block.lacking for path in PAGES.values() for block in blocks_of(path)]
    assert Counter(one for one in lacking if one is not None) == NOT_RUN


def test_every_block_says_what_it_is() -> None:
    known = {"sh", "python", "toml", *LOOKED_AT}
    unknown = [
        f"{block.place}: {block.language!r}"
        for path in PAGES.values()
        for block in blocks_of(path)
        if block.language not in known
    ]
    assert unknown == []


@pytest.mark.parametrize("name", PAGES)
def test_every_command_and_flag_is_there(name: str) -> None:
    for block in blocks_of(PAGES[name]):
        if block.language == "python":
            compile(block.text, block.place, "exec")
        for words in block.commands if block.language == "sh" else []:
            mine = ours(words)
            if mine is not None and "--config" not in mine:
                parsed(mine)


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as our pages take it for granted; each page gets a copy."""
    folder = tmp_path_factory.mktemp("furnished")
    furnish(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        furnish_adapters(folder)
    return folder


@pytest.fixture
def here(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A page's own folder; tables that a page enters things in are put back."""
    folder = tmp_path / "here"
    shutil.copytree(furnished, folder)
    monkeypatch.chdir(folder)
    methods, fused = dict(METHODS), dict(FUSED)
    yield folder
    for table, kept in ((METHODS, methods), (FUSED, fused)):
        table.clear()
        table.update(kept)  # type: ignore[arg-type]


# PEFT 0.21 asks a model of transformers 5.23 in the old way.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_a_page_runs_as_printed(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = Reader(here)
    for block in blocks_of(PAGES[name]):
        try:
            reader.do(block)
        except Exception as error:
            said = capsys.readouterr().err
            raise AssertionError(f"{block.place}: {error}\n{said[-2000:]}") from error


@pytest.mark.parametrize(
    "text",
    [
        "sidepath train --data a --output b --speed 9\n",
        "sidepath fly\n",
        "sidepath plan\n",
        "torchrun --nproc-per-node 2 -m sidepath -- train --data a --output b --distributed dpd\n",
    ],
)
def test_a_command_that_is_not_there_is_found(text: str) -> None:
    with pytest.raises((ConfigError, KeyError)):
        checked(Block("a page", 1, "sh", "needs a GPU", text))


def test_a_block_that_nothing_runs_is_found(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    with pytest.raises(AssertionError, match="say what it needs"):
        reader.do(Block("a page", 1, "sh", "", "curl localhost\n"))
    with pytest.raises(AssertionError, match="without a title"):
        reader.do(Block("a page", 1, "yaml", "", "a: 1\n"))
    with pytest.raises(NameError):
        reader.do(Block("a page", 1, "python", "", "there_is_no_such_name\n"))
