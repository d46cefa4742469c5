"""The package: one version everywhere, what it consists of, and that the wheel works by itself."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import sidepath

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_the_changelogs() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == sidepath.__version__ == PROJECT["project"]["version"]


def test_the_extras() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"quant", "serve", "report", "scale", "gguf", "bench", "triton", "dev"} <= set(extras)
    for extra in ("quant", "serve", "report", "gguf", "bench", "triton", "docs"):
        assert extra in extras["dev"][0]
    assert "scale" not in extras["dev"][0], "Ray listens on all interfaces"


def test_what_an_extra_asks_for_is_pinned() -> None:
    """Each package of an extra that make installs has its version in constraints.txt."""
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    extras = PROJECT["project"]["optional-dependencies"]
    asked = {re.split(r"[\[>=<;]", line)[0] for lines in extras.values() for line in lines} | {
        re.split(r"[\[>=<;]", line)[0] for line in PROJECT["project"]["dependencies"]
    }
    assert asked - {"sidepath"} - set(pinned) == set()


def test_the_source_archive_names_what_there_is() -> None:
    for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (ROOT / name).exists(), name


def test_hooks_run_what_make_lint_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["id"]: hook["entry"] for hook in repository["hooks"]}
    makefile = (ROOT / "Makefile").read_text()
    for entry in hooks.values():
        program = entry.split()[0]
        assert f"$(BIN)/{Path(program).name}" in makefile
    assert list(hooks) == ["ruff", "ruff-format", "mypy"]


@pytest.mark.parametrize(("covered", "passed"), [(95, True), (94, False), (100, True)])
def test_the_coverage_gate(covered: int, passed: bool) -> None:
    spec = importlib.util.spec_from_file_location("gate", ROOT / "scripts" / "coverage_gate.py")
    assert spec is not None
    assert spec.loader is not None
    gate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gate)
    totals = {
        "covered_lines": covered,
        "num_statements": 100,
        "covered_branches": 1,
        "num_branches": 4,
    }
    found, told = gate.verdict(totals)
    assert found is passed
    assert told == f"lines {covered:.2f} % (gate 95 %), branches 25.00 %"


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    """Built, installed with what it needs and nothing else, and the demo run: a few minutes."""
    pytest.importorskip("build")
    done = subprocess.run(
        ["sh", str(ROOT / "scripts" / "try_wheel.sh"), str(tmp_path / "tried")],
        env={**os.environ, "BUILDER": sys.executable, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"sidepath {sidepath.__version__}\n" in done.stdout
    assert "nothing that is needed is missing" in done.stdout
    assert (tmp_path / "tried" / "demo-output" / "demo-report.html").is_file()
    (wheel,) = (tmp_path / "tried" / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sidepath/base/model.safetensors" in names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
