"""The verb compare: the embedded base to a table, resumed; and everything wrong at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Run

SETTINGS = """
[compare]
data = "rows-that-are-not-there.tsv"
eval_data = "nor-these.tsv"
otherwise = "demo:sentiment"
learning_rates = [1e-3, 1e-2]
latency = ["1x8"]
rounds = 2
eval_limit = 8
max_new_tokens = 3

[train]
steps = 2
batch_size = 8

[[method]]
name = "lora"
r = 2

[[method]]
name = "full"
top = 1

[[method]]
name = "bitfit"
"""


def test_the_embedded_base_to_a_table(run: Run, tmp_path: Path) -> None:
    file, output = tmp_path / "compare.toml", tmp_path / "out"
    file.write_text(SETTINGS)
    words = ["compare", file, "--limit", 48, "--seeds", 2, "--output", output, "--json"]
    ran = run(*words)
    assert ran.code == 0, ran.err
    found = ran.document
    assert [row["method"] for row in found["rows"]] == ["lora", "full"]
    for row in found["rows"]:
        metric = row["metric"]
        assert (metric["name"], len(metric["values"])) == ("exact_match", 2)
        assert metric["low"] <= metric["mean"] <= metric["high"]
        assert min(row[name] for name in ("trainable", "bytes", "seconds", "peak_memory_bytes")) > 0
        assert len(row["sweep"]) == 2
        assert row["latency"][0]["operators"] == row["latency"][0]["base_operators"]
    assert [one["method"] for one in found["excluded"]] == ["bitfit"]
    assert "no bias to train" in found["excluded"][0]["reason"]
    assert found["trials"] == {"ran": 8, "total": 8}
    assert "comparing on demo:sentiment instead" in ran.err
    people = run(*words[:-1])
    assert "exact_match on 8 rows" in people.out
    assert "bitfit took no part" in people.out
    again = json.loads((output / "compare.json").read_text())
    assert again["trials"]["ran"] == 0
    assert [row["metric"] for row in again["rows"]] == [row["metric"] for row in found["rows"]]
    assert (output / "compare.md").is_file()


def test_a_preset_that_only_times(run: Run, tmp_path: Path, tiny_base: Path) -> None:
    flags = ["--rounds", 1, "--output", tmp_path / "out", "--limit", 40, "--max-tokens", 100]
    ran = run("compare", "--preset", "latency", "--base", tiny_base, *flags, "--json")
    assert ran.code == 0, ran.err
    assert ran.document["rows"][0]["metric"] is None
    assert [one["shape"] for one in ran.document["rows"][0]["latency"]][-1] == "1x128"
    assert ran.document["trials"]["ran"] == 0


def test_a_search_for_the_intrinsic_dimension(run: Run, tmp_path: Path, tiny_base: Path) -> None:
    """Real training of a tiny base, to the end; and again without training."""
    rows = tmp_path / "rows.tsv"
    told = [f"{('bad', 'good')[at % 2]} film {at}\t{at % 2}" for at in range(40)]
    rows.write_text("\n".join(["text\tlabel", *told]) + "\n")
    words = ["compare", "--intrinsic", "--data", rows, "--eval-data", rows, "--base", tiny_base]
    words += ["--seeds", 2, "--learning-rates", "1e-3,1e-2", "--steps", 3, "--batch-size", 8]
    words += ["--dimensions", "20,320,3", "--subspace", "did", "--output", tmp_path / "out"]
    ran = run(*words, "--json")
    assert ran.code == 0, ran.err
    found = ran.document["intrinsic"]
    assert (found["share"], found["kind"], found["dimensions"]) == (0.9, "did", [20, 80, 320])
    assert found["target"] == pytest.approx(0.9 * found["full"])
    full, *inside = ran.document["rows"]
    assert [row["settings"]["d"] for row in inside] == [trial["d"] for trial in found["trials"]]
    # The head that no checkpoint filled is trained whole beside the d numbers.
    assert len({row["trainable"] - row["settings"]["d"] for row in inside}) == 1
    assert all(len(row["metric"]["values"]) == len(row["sweep"]) == 2 for row in (full, *inside))
    assert found["full"] == full["metric"]["mean"] > 0
    again = run(*words)
    assert again.code == 0, again.err
    assert "dimensions tried (did)" in again.out
    assert "d90" in again.out
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["trials"]["ran"] == 0


def test_everything_wrong_with_a_file_is_said_at_once(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(
        "[compare]\ndatta = 1\nvalidation = 2.0\n[train]\nseed = 3\nstep = 1\n[lorra]\n"
        '[[method]]\nname = "lorra"\n[[method]]\nname = "lora"\nr = 0\n'
    )
    ran = run("compare", file, "--output", tmp_path / "out", "--workers", 0)
    assert (ran.code, ran.out) == (2, "")
    for part in (
        'no field "datta": did you mean "data"',
        "validation = 2.0",
        "workers = 0",
        "[train] seed: compare decides it itself",
        'no field "step"',
        "no table [lorra]",
        'unknown method "lorra"',
        "(lora): r = 0",
    ):
        assert part in ran.err, part
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "flags", "fragment"),
    [
        ("[compare]\nseeds = 2\n", (), "one of [[method]] tables, --preset and --intrinsic"),
        ('[[method]]\nname = "lora"\n', ("--preset", "which-rank"), "one of [[method]]"),
        ('[[method]]\nname = "lora"\n', ("--intrinsic",), "one of [[method]]"),
        ("[compare]\nintrinsic = true\n", ("--preset", "latency"), "one of [[method]]"),
        ('[[method]]\nname = "lora"\n', ("--share", 0.8), "share: only --intrinsic reads it"),
        ("[compare]\nintrinsic = true\nrounds = 3\n", (), "rounds: --intrinsic times nothing"),
        ("[compare]\nintrinsic = true\nshare = 1.5\n", (), "share = 1.5"),
        ("[compare]\nintrinsic = true\n", ("--dimensions", "9,3,2"), "dimensions = (9, 3, 2)"),
        ("[compare]\nintrinsic = true\n", ("--dimensions", "2,9e9,3"), "--dimensions"),
        ("[compare]\nintrinsic = true\n", ("--metric", "loss"), "more is better"),
        ("[compare]\nintrinsic = true\n", ("--dimensions", "3,4000000,2"), "d = 4000000: "),
        ("method = 3\n", (), "expected tables [[method]]"),
        ('[[method]]\nname = "lora"\n', ("--latency", "3by4"), "ROWSxTOKENS"),
        ('[[method]]\nname = "bitfit"\n', ("--latency", "none", "--limit", 40), "no bias to train"),
        ('[[method]]\nname = "lora"\n', ("--data", "gone.tsv"), "no test rows"),
        ('[[method]]\nname = "bitfit"\n', ("--limit", 40), "no bias to train"),
        ("= 3", (), "not TOML"),
    ],
)
def test_bad_input(
    run: Run, tmp_path: Path, text: str, flags: tuple[object, ...], fragment: str
) -> None:
    file = tmp_path / "compare.toml"
    file.write_text(text)
    ran = run("compare", file, "--output", tmp_path / "out", *flags)
    assert ran.code == 2, ran.err
    assert fragment in ran.err
    assert "internal fault" not in ran.err


def test_the_settings_file_needs_no_flag(run: Run, tmp_path: Path) -> None:
    ran = run("compare", "--config", tmp_path / "compare.toml")
    assert ran.code == 2
    assert "without a flag" in ran.err
    assert run("compare", tmp_path / "gone.toml").code == 2
