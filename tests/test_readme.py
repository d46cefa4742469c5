"""The README is executed: its Python as it stands, its commands on the embedded base."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sidepath.base import embedded_base
from sidepath.cli import main
from sidepath.cli.gating import terms_of
from sidepath.cli.parsing import parse
from sidepath.cli.runs import TrainRun
from sidepath.cli.serve_run import ServeRun
from sidepath.serve.keys import read_keys
from tests.documents import ROOT, Block, blocks_of, furnish, ours

README = ROOT / "README.md"
BLOCKS = blocks_of(README)


def the(language: str, part: str) -> Block:
    """The one block of a language that holds a text."""
    (block,) = [one for one in BLOCKS if one.language == language and part in one.text]
    return block


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the data files that the README names."""
    furnish(tmp_path)
    (tmp_path / "settings.toml").write_text("[lora]\nr = 4\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def do(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run one command; MODEL stands for the embedded base."""
    mine = ours(words)
    assert mine is not None, words
    mine = [word if word != "MODEL" else str(embedded_base()) for word in mine]
    assert main(mine) == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"


def test_the_library_example_runs_as_printed(here: Path) -> None:
    code = [block.text for block in BLOCKS if block.language == "python"]
    assert all(block.count("\n") <= 40 for block in code)
    # `exec` reads our own README: the point of the test.
    exec(compile("".join(code), "README.md", "exec"), {})
    assert (here / "adapters" / "sql" / "adapter_model.safetensors").is_file()


def test_the_commands_run_as_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = the("", "sidepath plan").commands
    assert [words[1] for words in commands] == [
        "plan",
        "train",
        "eval",
        "generate",
        "inspect",
        "merge",
        "config",
        "bench",
    ]
    for words in commands:
        do(words, capsys)
    assert (here / "merged" / "parity.json").is_file()


def test_the_ways_to_train_run_as_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *commands, launched = the("", "--dry-run").commands
    assert len(commands) == 4
    for words in commands:
        if "--quantise" in words:
            pytest.importorskip("bitsandbytes")
        do(words, capsys)
    assert {path.name for path in (here / "adapters").iterdir()} == {"long", "mixed", "small"}
    # What torchrun does with it: tests/cli/test_distributed.py.
    mine = ours(launched)
    assert mine is not None
    assert parse("train", mine[1:]).settings.build("run", TrainRun).distributed == "ddp"


def test_the_hand_overs_run_as_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    for name in ("mine", "other"):
        trained = f"train --data train.jsonl --output adapters/{name} --steps 2 --no-forgetting"
        assert main(trained.split()) == 0, capsys.readouterr().err
    *commands, pushed = the("", "sidepath combine").commands
    for words in commands:
        do(words, capsys)
    assert "5 of 5 adapters, 0 damaged" in capsys.readouterr().out
    assert {path.name for path in (here / "adapters").iterdir()} == {
        "mine", "other", "both", "small", "again",
    }  # fmt: skip
    # What it sends, and to whom: tests/store/test_pushing.py.
    assert parse("push", pushed[2:]).places == ("adapters/mine", "hub:me/mine")


def test_the_server_s_keys_are_made_as_printed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *made, served = the("", "--new-key").commands
    for words in made:
        do(words, capsys)
    assert {key.name: key.admin for key in read_keys(here / "keys.json").all} == {
        "tenant": False,
        "operator": True,
    }
    # What it then does: tests/security, tests/cli/test_serve.py.
    run = parse("serve", served[2:]).settings.build("serve", ServeRun)
    (here / "adapters").mkdir()
    assert terms_of(run).loading is not None


def test_make_targets_the_readme_names_exist() -> None:
    makefile = README.with_name("Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README.read_text(), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
