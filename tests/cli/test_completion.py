"""`sidepath completion`: what a shell offers is what there is."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest

from sidepath.cli.completion import SHELLS, names_of, values_of
from sidepath.cli.options import flags_of
from sidepath.cli.surface import VERBS, sections_of
from sidepath.methods import METHODS

from .conftest import Run


def offered(*words: str) -> list[str]:
    """What bash offers for the last of these words of a command."""
    line = " ".join(f"'{word}'" for word in words)
    asked = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _sidepath; echo "${{COMPREPLY[@]}}"'
    ran = subprocess.run(
        ["bash", "-c", f"{SHELLS['bash']()}\n{asked}"], capture_output=True, text=True, check=True
    )
    assert ran.stderr == ""
    return ran.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_flags_and_values() -> None:
    assert offered("sidepath", "comp") == ["compare", "completion"]
    assert set(VERBS) < set(offered("sidepath", ""))
    assert offered("sidepath", "train", "--out") == ["--output"]
    assert offered("sidepath", "train", "--dtype", "") == ["auto", "float32", "bfloat16", "float16"]
    assert offered("sidepath", "train", "--no-forg") == ["--no-forgetting"]
    assert offered("sidepath", "eval", "--kernels", "") == []
    assert offered("sidepath", "merge", "some") == []  # bash completes files then


def test_every_flag_of_every_method_is_there() -> None:
    for name, verb in VERBS.items():
        names = names_of(verb)
        assert len(names) == len({*names})
        for method in METHODS:
            wanted = {flag.name for flag in flags_of(sections_of(verb, method))}
            assert wanted <= {*names}, name


def test_values_are_the_words_of_a_choice() -> None:
    flags = {flag.name: flag for flag in flags_of(sections_of(VERBS["train"], "lora"))}
    assert "pissa" in values_of(flags["--start"])
    assert values_of(flags["--r"]) == ()


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_its_script(run: Run, shell: str) -> None:
    ran = run("completion", shell)
    assert ran.code == 0
    assert ran.out.rstrip("\n") == SHELLS[shell]().rstrip("\n")
    assert run("completion", shell, "--json").document["shell"] == shell
    for word in ("doctor", "train", "learning-rate", "pissa"):
        assert word in ran.out


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_that_cannot_be_tried_are_parsed(shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        # At least every quote that is opened is closed.
        assert "sidepath" in shlex.split(SHELLS[shell](), comments=True)
        return
    subprocess.run([program, "-n"], input=SHELLS[shell](), text=True, check=True)


def test_another_shell_is_refused(run: Run) -> None:
    ran = run("completion", "fsh")
    assert ran.code == 2
    assert 'did you mean "fish"' in ran.err
