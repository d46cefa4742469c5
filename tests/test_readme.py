"""The README is executed: its Python as it stands, its commands on the embedded base."""

from __future__ import annotations

import json
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
from sidepath.demo.tasks import make_tasks
from sidepath.serve.keys import read_keys

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    return [text for found, text in fenced if found == language]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the data files that the README names."""
    rows = make_tasks()[1].train[:16]
    for name in ("sql.jsonl", "train.jsonl", "dev.jsonl", "a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "settings.toml").write_text("[lora]\nr = 4\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_library_example_runs_as_printed(here: Path) -> None:
    code = blocks("python")
    assert all(block.count("\n") <= 40 for block in code)
    # `exec` reads our own README: the point of the test.
    exec(compile("".join(code), "README.md", "exec"), {})
    assert (here / "adapters" / "sql" / "adapter_model.safetensors").is_file()


def test_the_commands_run_as_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [text for text in blocks("") if "sidepath plan" in text]
    lines = [line.partition(" #")[0] for line in block.splitlines() if line.strip()]
    assert [line.split()[1] for line in lines] == [
        "plan",
        "train",
        "eval",
        "generate",
        "inspect",
        "merge",
        "config",
        "bench",
    ]
    for line in lines:
        words = [word if word != "MODEL" else str(embedded_base()) for word in shlex.split(line)]
        assert main(words[1:]) == 0, capsys.readouterr().err
    assert (here / "merged" / "parity.json").is_file()


def test_the_ways_to_train_run_as_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [text for text in blocks("") if "--dry-run" in text]
    *lines, launched = block.splitlines()
    assert len(lines) == 4
    for line in lines:
        if "--quantise" in line:
            pytest.importorskip("bitsandbytes")
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert {path.name for path in (here / "adapters").iterdir()} == {"long", "mixed", "small"}
    # What torchrun does with it: tests/cli/test_distributed.py.
    call = parse("train", shlex.split(launched)[shlex.split(launched).index("train") + 1 :])
    assert call.settings.build("run", TrainRun).distributed == "ddp"


def test_the_hand_overs_run_as_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    (block,) = [text for text in blocks("") if "sidepath combine" in text]
    (here / "sample.txt").write_text("How many cities are there?\nA line of its own.\n")
    for name in ("mine", "other"):
        trained = f"train --data train.jsonl --output adapters/{name} --steps 2 --no-forgetting"
        assert main(trained.split()) == 0, capsys.readouterr().err
    *lines, pushed = block.splitlines()
    for line in lines:
        words = [word if word != "MODEL" else str(embedded_base()) for word in shlex.split(line)]
        assert main(words[1:]) == 0, f"{line}: {capsys.readouterr().err}"
    assert "5 of 5 adapters, 0 damaged" in capsys.readouterr().out
    assert {path.name for path in (here / "adapters").iterdir()} == {
        "mine", "other", "both", "small", "again",
    }  # fmt: skip
    # What it sends, and to whom: tests/store/test_pushing.py.
    assert parse("push", shlex.split(pushed)[2:]).places == ("adapters/mine", "hub:me/mine")


def test_the_server_s_keys_are_made_as_printed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [text for text in blocks("") if "--new-key" in text]
    *made, served = [shlex.split(line, comments=True) for line in block.splitlines()]
    for words in made:
        assert main(words[1:]) == 0, capsys.readouterr().err
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
