"""Every figure runs at quick size; names, families, and what is unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sidepath.bench.crowd import Crowd
from sidepath.bench.figure import OURS
from sidepath.bench.peers import PEER_MISSING, has_peft
from sidepath.bench.setting import NOT_A_MEASUREMENT, Bench
from sidepath.bench.table import ASKED_FOR, FIGURES, chosen, family, measured, notes_of
from sidepath.errors import ConfigError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def _cases() -> list[Any]:
    """Each figure; of the compiled training steps, which take longest, one goes with the slow."""
    slow = "compiled-step-bf16"
    return [pytest.param(name, marks=[pytest.mark.slow] * (name == slow)) for name in FIGURES]


@pytest.mark.parametrize("name", _cases())
def test_every_figure_runs(name: str, quick: Bench) -> None:
    (figure,), document = measured([name], quick, threads=1)
    json.dumps(document, allow_nan=False)
    (found,) = document["figures"]
    assert found["name"] == figure.name == name
    assert found["ours"] > 0
    assert set(found["ratio"]) == {"of", "median", "min", "max"}
    peers = has_peft() and not any("PEFT left out" in note for note in figure.notes)
    assert (found["peer"] is not None) == peers
    if peers:
        assert 0 < found["ratio"]["min"] <= found["ratio"]["median"] <= found["ratio"]["max"]
    assert document["quick"] is True
    assert NOT_A_MEASUREMENT in document["notes"]


def test_every_target_is_of_ways_that_the_figure_measures(quick: Bench) -> None:
    """A target that names a way wrongly would be left out in silence."""
    for name in ("step-llama-bf16", "memory-saved", "decode-8", "routed-decode-4-f32"):
        measure = FIGURES[name]
        figure = measure(name, quick)
        wanted = {of for of in vars(measure)["targets"] if has_peft() or "PEFT" not in of}
        assert wanted <= {one.of for one in figure.comparisons if one.target is not None}


@pytest.mark.usefixtures("without_peft")
def test_without_the_peer_the_output_says_what_to_install(quick: Bench) -> None:
    figures, document = measured(["switching-inject", "switching-merged"], quick, threads=1)
    assert PEER_MISSING in document["notes"]
    assert all(set(figure.ways) <= {OURS, "base"} for figure in figures)
    assert all(found["peer"] is None for found in document["figures"])


def test_others_on_the_machine_are_told_of_at_full_size_only() -> None:
    crowded = Crowd(0.5)
    assert notes_of(Bench(), crowded)[0] == crowded.note
    assert crowded.note not in notes_of(Bench(quick=True), crowded)
    assert NOT_A_MEASUREMENT not in notes_of(Bench(), Crowd(0.0))


def test_progress_is_told_after_each_figure(quick: Bench) -> None:
    told: list[tuple[int, int, str]] = []

    def progress(done: int, total: int, facts: str = "") -> None:
        told.append((done, total, facts))

    measured(["switching-merged", "decode-1"], quick, threads=1, progress=progress)
    assert told == [(1, 2, "switching-merged done"), (2, 2, "decode-1 done")]


def test_all_that_is_quick_is_the_default() -> None:
    names = chosen([])
    assert names
    assert not any(name in ASKED_FOR or family(name) in ASKED_FOR for name in names)
    assert set(FIGURES) - set(names) == {
        name for name in FIGURES if name in ASKED_FOR or family(name) in ASKED_FOR
    }


def test_families_and_figures_are_chosen_once_in_the_tables_order() -> None:
    assert chosen(["memory", "decode-1", "memory-peak"]) == [
        "memory-saved",
        "memory-peak",
        "memory-peak-checkpointing",
        "decode-1",
    ]
    assert chosen(["compiled"]) == [name for name in FIGURES if family(name) == "compiled"]
    assert "switching-load-100-peft" not in chosen(["switching"])
    assert chosen(["switching-load-100-peft"]) == ["switching-load-100-peft"]


def test_unknown_figures_are_told_all_at_once_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as raised:
        chosen(["step", "stepp", "decode-9", "zzz"])
    error = raised.value
    assert error.what == "unknown figures stepp, decode-9, zzz"
    assert len(error.faults) == 3
    assert 'did you mean "step"' in error.faults[0]
    assert '"decode-8"' in error.faults[1]
    assert "nothing is named like it" in error.faults[2]


def test_every_family_of_a_script_exists() -> None:
    """`python benchmarks/step.py` measures the family of its own name."""
    scripts = [path for path in BENCHMARKS.glob("*.py") if 'family("' in path.read_text()]
    assert {path.stem for path in scripts} >= {"step", "memory", "decode", "compiled"}
    for path in scripts:
        assert f'family("{path.stem}")' in path.read_text()
        assert path.stem in map(family, FIGURES)
