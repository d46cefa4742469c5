"""The verb bench, on figures of tiny shapes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import Run


def test_the_document(run: Run) -> None:
    threads = torch.get_num_threads()
    ran = run("bench", "memory-saved", "switching-merged", "--quick", "--threads", 1, "--json")
    assert ran.code == 0, ran.err
    document: Any = ran.document
    names = [figure["name"] for figure in document["figures"]]
    assert names == ["memory-saved", "switching-merged"]
    for figure in document["figures"]:
        assert {"name", "ours", "peer", "ratio"} <= set(figure)
        assert {"median", "min", "max"} <= set(figure["ratio"])
    assert document["threads"] == 1
    assert "1 threads" in document["machine"]
    assert torch.get_num_threads() == threads
    assert "figures 1/2, memory-saved done" in ran.err


def test_the_help_names_every_family(run: Run) -> None:
    from sidepath.bench.table import FIGURES, family

    text = " ".join(run("bench", "--help").out.split())
    families = ", ".join(dict.fromkeys(map(family, FIGURES)))
    assert f"FIGURE is a family ({families})" in text


def test_for_people(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    ran = run("bench", "switching-merged", "--quick", "--output", folder)
    assert ran.code == 0, ran.err
    assert "switching-merged  ours / base  1.00" in ran.out
    assert "not a measurement" in ran.out
    assert {path.name for path in folder.iterdir()} == {
        "bench.json",
        "bench.md",
        "bench.png",
        "bench.svg",
    }


def test_without_peft_and_matplotlib_it_says_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("peft", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    ran = run("bench", "switching-merged", "--quick", "--output", tmp_path)
    assert ran.code == 0, ran.err
    assert "pip install 'sidepath[bench]'" in ran.out
    assert "pip install 'sidepath[report]'" in ran.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("decode-2",), ("unknown figure decode-2", 'did you mean "decode-')),
        (("--rounds", "0"), ("rounds",)),
        (("--threads", "0"), ("threads",)),
        (("--device", "cuda", "step"), ("torch sees no GPU",)),
    ],
)
def test_wrong_input_is_two(run: Run, arguments: tuple[str, ...], told: tuple[str, ...]) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = run("bench", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert all(text in ran.err for text in told)
    assert "Traceback" not in ran.err


def test_an_output_that_cannot_be_is_found_before_anything_is_measured(
    run: Run, tmp_path: Path
) -> None:
    taken = tmp_path / "file"
    taken.write_text("mine")
    ran = run("bench", "switching-merged", "--quick", "--output", taken)
    assert ran.code == 2
    assert "not a folder" in ran.err
    assert "figures" not in ran.err
    assert taken.read_text() == "mine"
