"""`sidepath doctor`: what is there, what is missing, and the command that installs it."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sidepath import __version__
from sidepath.cli import doctor

from .conftest import Run

LINES = tuple(
    Requirement(line)
    for line in (
        "torch>=2.10",
        "nowhere-to-be-found>=3",
        "old-one>=3; python_version < '3'",
        'nothing-like-it; extra == "quant"',
        'torch; extra == "report"',
        'sidepath[quant,report]; extra == "dev"',
        'also-missing>=1; extra == "dev"',
    )
)
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def test_the_document(run: Run) -> None:
    document = run("doctor", "--json").document
    assert document["sidepath"] == __version__
    packages = {one["name"]: one for one in document["packages"]}
    assert packages["torch"]["found"] == metadata.version("torch")
    assert all(one["met"] for one in document["packages"])
    assert document["devices"][0]["name"] == "cpu"
    assert document["memory"]["total"] > document["memory"]["available"] > 0
    assert set(document["usable"]) == {"cuda", "bitsandbytes", "triton"}
    assert document["faults"] == []
    for one in document["extras"]:
        assert (one["install"] is None) == (one["missing"] == [])


def test_for_people(run: Run) -> None:
    told = run("doctor").out
    for part in ("packages", "extras", "devices", "usable", "nothing that is needed is missing"):
        assert part in told


def test_what_is_missing_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: LINES)
    monkeypatch.setattr(doctor, "extras", lambda _: ["dev", "quant", "report"])
    document = run("doctor", "--json").document
    assert document["faults"] == [
        "nowhere-to-be-found>=3 is needed, found none: pip install 'nowhere-to-be-found>=3'"
    ]
    extras = {one["name"]: (one["missing"], one["install"]) for one in document["extras"]}
    assert extras == {
        "dev": (["nothing-like-it", "also-missing"], "pip install 'sidepath[dev]'"),
        "quant": (["nothing-like-it"], "pip install 'sidepath[quant]'"),
        "report": ([], None),
    }
    told = run("doctor").out
    assert "pip install 'sidepath[quant]'" in told
    assert "nowhere-to-be-found" in told


def test_versions_are_held_against_what_is_wanted() -> None:
    assert doctor.Need("torch", ">=2.10", "2.13.0+cpu").met
    assert not doctor.Need("torch", ">=2.10", "2.9.1").met
    assert not doctor.Need("torch", "", None).met


def test_it_works_where_torch_does_not() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from sidepath.cli import main; sys.exit(main(['doctor', '--json']))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert "torch cannot be imported" in document["faults"][0]
    assert [one["usable"] for one in document["usable"].values()] == [False] * 3


def test_a_source_tree_that_is_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirements", tuple)
    document = run("doctor", "--json").document
    assert (document["packages"], document["extras"]) == ([], [])
    assert "not installed as a package" in document["faults"][0]


def test_a_library_that_is_broken_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def broken() -> object:
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr("sidepath.core.quant.require_bitsandbytes", broken)
    assert doctor.packing(torch) == {"usable": False, "why": "RuntimeError: no kernel; image"}


def test_packing_is_tried() -> None:
    pytest.importorskip("bitsandbytes")
    import torch

    assert doctor.packing(torch)["usable"] is True


def test_every_extra_says_what_it_is_for() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert set(extras) == set(doctor.PURPOSES)
