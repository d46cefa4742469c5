"""Default, file, flag: who wins, what is refused, and what `config` prints."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from sidepath.cli.options import flags_of
from sidepath.cli.parsing import parse
from sidepath.cli.surface import VERBS, sections_of
from sidepath.config import TrainConfig
from sidepath.errors import ConfigError
from sidepath.methods.lora import LoRA

from .conftest import Run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text('[lora]\nr = 4\nalpha = 8\ntargets = ["q_proj"]\n[train]\nsteps = "none"\n')
    return path


def test_default_then_file_then_flag(run: Run, file: Path) -> None:
    found = run("config", "--config", file, "--r", 2, "--json").document
    assert found["lora"]["r"] == {"value": 2, "source": "flag"}
    assert found["lora"]["alpha"] == {"value": 8, "source": "file"}
    assert found["lora"]["dropout"] == {"value": LoRA().dropout, "source": "default"}
    assert found["train"]["steps"] == {"value": None, "source": "file"}


def test_a_flag_that_repeats_the_default_counts_as_a_flag(run: Run) -> None:
    found = run("config", "--r", LoRA().r, "--json").document
    assert found["lora"]["r"]["source"] == "flag"


def test_defaults_are_the_dataclasses_own(run: Run) -> None:
    found = run("config", "--json").document
    for field in dataclasses.fields(TrainConfig):
        assert found["train"][field.name] == {"value": field.default, "source": "default"}


def test_what_config_prints_is_read_back_as_the_same_settings(run: Run, tmp_path: Path) -> None:
    awkward = 'a "b" \\ c\x7f'
    flags = ["--columns", f"prompt={awkward}", "--rank-pattern", "a.*=3", "--layers", "0,1"]
    flags += ["--dtype", "bfloat16", "--targets", "c_attn:q,v", "--resume", "--limit", "5"]
    printed = run("config", "--data", "d.csv", "--output", "o", *flags)
    path = tmp_path / "again.toml"
    path.write_text(printed.out, encoding="utf-8")
    first, second = (
        parse("config", list(arguments)).settings
        for arguments in (
            ["--data", "d.csv", "--output", "o", *flags],
            ["--config", str(path)],
        )
    )
    for section, cls in first.sections.items():
        assert first.build(section, cls) == second.build(section, cls)
    assert {source for fields in second.values.values() for _, source in fields.values()} == {
        "file"
    }


def test_config_says_where_each_value_came_from(run: Run, file: Path) -> None:
    text = run("config", "--config", file, "--steps", "9").out
    assert "r = 4  # file" in text
    assert "steps = 9  # flag" in text
    assert 'bias = "none"  # default' in text
    assert tomllib.loads(text)["train"]["steps"] == 9


def test_all_unknown_settings_are_named_at_once_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text("stray = 1\n[lora]\nrankpattern = 1\n[trian]\nsteps = 1\n")
    with pytest.raises(ConfigError) as caught:
        parse("train", ["--config", str(path)])
    assert caught.value.where == str(path)
    text = "\n".join(caught.value.faults)
    assert '"rank_pattern"' in text
    assert '"train"' in text
    assert '"stray"' in text


def test_a_wrong_type_in_the_file_names_file_and_table(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('[lora]\nr = "eight"\n')
    with pytest.raises(ConfigError) as caught:
        parse("config", ["--config", str(path)]).settings.build("lora", LoRA)
    assert str(path) in str(caught.value)
    assert "[lora]" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        parse("config", ["--config", str(path), "--r", "0"]).settings.build("lora", LoRA)
    assert str(path) not in str(caught.value)


def test_tables_of_other_commands_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "all.toml"
    path.write_text("[eval]\nbatch_size = 3\n[train]\nsteps = 2\n")
    assert parse("train", ["--config", str(path)]).settings.values["train"]["steps"] == (2, "file")
    assert parse("eval", ["--config", str(path)]).settings.values["eval"]["batch_size"][0] == 3


def test_the_method_may_come_from_the_file_and_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "method.toml"
    path.write_text('[run]\nmethod = "lorra"\n')
    with pytest.raises(ConfigError, match='"lorra"') as caught:
        parse("train", ["--config", str(path)])
    assert caught.value.hint == 'did you mean "lora"?'
    assert parse("train", ["--config", str(path), "--method", "lora"]).method == "lora"


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_has_a_docstring_and_it_is_the_help(run: Run, verb: str) -> None:
    shown = " ".join(run(verb, "--help").out.split())
    for flag in flags_of(sections_of(VERBS[verb], "lora")):
        assert flag.doc, f"{flag.section}.{flag.field} has no docstring"
        assert flag.name in shown
        words = flag.doc.replace("-", "").replace(" ", "")
        assert words in shown.replace("-", "").replace(" ", "")
