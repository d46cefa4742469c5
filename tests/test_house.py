"""The house keeps its shape: imports go down the floors, and `import sidepath` stays light."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sidepath

SOURCE = Path(__file__).resolve().parents[1] / "src" / "sidepath"
FLOORS = {
    "errors": 0,
    "config": 0,
    "base": 0,
    "page": 0,
    "kernels": 1,
    "core": 1,
    "methods": 2,
    "injection": 3,
    "store": 4,
    "convert": 5,
    "data": 5,
    "training": 5,
    "analyse": 5,
    "merging": 5,
    "serve": 5,
    "combining": 6,
    "demo": 6,
    "bench": 6,
    "compare": 6,
    "cli": 7,
}
APART = {"training", "analyse", "merging", "serve", "convert"}
"""Rooms of one floor that do not know each other."""
DOWN_WITHIN = {
    ("core", "kernels"),
    ("config", "errors"),
    ("training", "data"),
    ("compare", "bench"),
    ("compare", "demo"),
}


def faults_of(room: str, text: str) -> list[str]:
    """Imports in a file of `room` that go up, or across to a room it must not know."""
    faults = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.level == 0 else [f"relative {node.module}"]
            if names == ["sidepath"]:
                names = [f"sidepath.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        faults += [name for name in names if not _allowed(room, name)]
    return faults


def _allowed(room: str, name: str) -> bool:
    if name.startswith("relative"):
        return False
    if name.split(".")[0] != "sidepath" or name == "sidepath":
        return name != "sidepath"
    other = name.split(".")[1]
    if other == room or other == "__version__":
        return True
    if other not in FLOORS:
        return False
    same = FLOORS[other] == FLOORS[room]
    return FLOORS[other] < FLOORS[room] or (same and (room, other) in DOWN_WITHIN)


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "scripts"])
def test_scripts_that_no_test_runs_import_what_there_is(folder: str) -> None:
    root = SOURCE.parents[1]
    missing = [
        f"{path.relative_to(root)}: {node.module}.{alias.name}"
        for path in sorted((root / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sidepath")
        for alias in node.names
        if not _is_there(str(node.module), alias.name)
    ]
    assert missing == []


def _is_there(module: str, name: str) -> bool:
    try:
        return name in dir(importlib.import_module(module)) or bool(
            importlib.import_module(f"{module}.{name}")
        )
    except ImportError:
        return False


def test_every_import_goes_down() -> None:
    files = [path for path in SOURCE.rglob("*.py") if path.parent != SOURCE]
    files += [SOURCE / "errors.py", SOURCE / "config.py"]
    assert len(files) > 20
    faults = []
    for path in files:
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        faults += [f"{path.name} imports {name}" for name in faults_of(room, path.read_text())]
    assert not faults


@pytest.mark.parametrize(
    ("room", "text"),
    [
        ("core", "from sidepath.store.adapter import Adapter"),
        ("methods", "import sidepath.injection.surgery"),
        ("data", "from sidepath.training.batching import Batch"),
        ("training", "def late():\n    from sidepath.analyse import spectrum"),
        ("store", "from sidepath import train"),
        ("kernels", "from sidepath.core import views"),
        ("store", "import sidepath"),
        ("store", "from . import folder"),
        ("training", "from sidepath.bench.timing import Clock"),
        ("demo", "from sidepath.bench.timing import Clock"),
        ("bench", "from sidepath.compare.run import run_comparison"),
        ("analyse", "from sidepath.combining.dense import nearest"),
        ("combining", "from sidepath.compare.run import run_comparison"),
        ("errors", "from sidepath.config import TrainConfig"),
    ],
)
def test_the_floors_test_can_fail(room: str, text: str) -> None:
    assert faults_of(room, text)


def test_every_module_stands_in_the_plan() -> None:
    """One line a module, under its room, and no line for a module that is not there."""
    plan = (SOURCE.parents[1] / "docs" / "structure.md").read_text()
    rooms = re.findall(r"\*\*(\w+)/\*\*\n\n((?:- .*\n)+)", plan)
    named = {(room, name) for room, lines in rooms for name in re.findall(r"- `(\w+\.py)`", lines)}
    found = {
        (path.parent.name, path.name)
        for path in SOURCE.glob("*/*.py")
        if not path.name.startswith("__") and path.parent.name != "base"
    }
    assert named == found


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_sidepath_loads_nothing_heavy() -> None:
    """No server, plotting, dataset or metric library; torch and transformers on first use only."""
    heavy = (
        "torch transformers datasets matplotlib starlette uvicorn sklearn sacrebleu rouge_score "
        "pandas scipy bitsandbytes peft triton"
    )
    assert (
        run(f"import sidepath, sys; print([m for m in '{heavy}'.split() if m in sys.modules])")
        == "[]"
    )
    lazily = "starlette uvicorn matplotlib datasets sklearn sacrebleu rouge_score peft triton"
    code = (
        "import sidepath, sys; [getattr(sidepath, n) for n in sidepath.__all__];"
        f"print([m for m in '{lazily}'.split() if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_the_public_names() -> None:
    assert sorted(sidepath.__all__) == [
        "Adapter",
        "AdapterFusion",
        "BitFit",
        "Bottleneck",
        "Combination",
        "Extraction",
        "IntrinsicDimension",
        "Library",
        "LoRA",
        "Plan",
        "PrefixTuning",
        "PromptTuning",
        "StepReport",
        "TrainConfig",
        "VeRA",
        "VersatileLM",
        "__version__",
        "activate",
        "add_tokens",
        "combine",
        "dequantise_",
        "disabled",
        "embedded_base",
        "errors",
        "evaluate",
        "extract",
        "forgetting",
        "generate",
        "inject",
        "inject_eva",
        "load",
        "load_data",
        "merge",
        "merge_folder",
        "plan",
        "quantise_",
        "remove",
        "route",
        "train",
        "train_together",
        "unmerge",
        "use_kernels",
    ]
    assert callable(sidepath.inject)
    assert callable(sidepath.train), "no package hides a verb of the same name"


def test_every_exception_is_drawn_in_the_tree() -> None:
    from sidepath import errors

    tree = errors.__doc__ or ""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, Exception):
            assert name in tree
            assert issubclass(value, (errors.SidepathError, Warning))
