"""Several sources of data with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sidepath.data.dataset import load_data
from sidepath.data.portions import Portion
from sidepath.errors import DataError, TrainError


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    first = [{"prompt": f"a{at}", "completion": "x"} for at in range(30)]
    first[4]["completion"] = ""
    second = [{"prompt": f"b{at}", "completion": "y"} for at in range(10)]
    return [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)]


@pytest.mark.parametrize("stream", [False, True])
def test_each_portion_knows_its_rows(tokenizer: Any, files: list[Path], stream: bool) -> None:
    data = load_data(files, tokenizer, weights=[3, 1.0], stream=stream)
    a, b = map(str, files)
    assert data.parts == (Portion(a, 0, 29, 0.75), Portion(b, 29, 39, 0.25))
    assert (data.place(4), data.place(29)) == (f"{a}, line 6", f"{b}, line 1")
    assert data.name == f"{a}, {b}"
    assert data.identity["weights"] == [0.75, 0.25]
    audit = data.audit
    assert (audit.rows_read, audit.rows, audit.empty) == (40, 39, 1)
    assert audit.as_dict()["portions"][1] == {"name": b, "rows": 10, "weight": 0.25}
    assert "29 rows, weight 75.0%" in str(audit)
    assert ["a0" in text for text in audit.samples] == [True, False, False, False, False]
    assert ["b0" in text for text in audit.samples] == [False, True, False, False, False]


def test_without_weights_each_row_counts_the_same(tokenizer: Any, files: list[Path]) -> None:
    data = load_data(files, tokenizer)
    assert [part.weight for part in data.parts] == [29 / 39, 10 / 39]
    assert data.identity["weights"] is None
    assert (
        load_data(files, tokenizer, limit=3).lengths
        == load_data([*map(str, files)], tokenizer, limit=3).lengths
    )


def test_units_and_formats_may_differ(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nhi\nho\n")
    (tmp_path / "b.json").write_text('[{"text": "x"}]')
    data = load_data([tmp_path / "a.csv", tmp_path / "b.json"], tokenizer)
    assert [data.place(row).split("/")[-1] for row in range(3)] == [
        "a.csv, line 2",
        "a.csv, line 3",
        "b.json, row 1",
    ]


def test_a_share_of_each_portion_is_held_out(tokenizer: Any, files: list[Path]) -> None:
    data = load_data(files, tokenizer, weights=[1, 1])
    kept, held = data.split(0.2, seed=0)
    assert [len(part) for part in held.parts] == [6, 2]
    assert [len(part) for part in kept.parts] == [23, 8]
    assert [part.weight for part in kept.parts] == [0.5, 0.5]
    without = load_data(files, tokenizer).split(0.2, seed=0)[0]
    assert [part.weight for part in without.parts] == [23 / 31, 8 / 31]
    places = [part.place(row) for part in (kept, held) for row in range(len(part))]
    assert sorted(places) == sorted(data.place(row) for row in range(len(data)))
    for part in (kept, held):
        for row in range(len(part)):
            letter = "a" if "a.jsonl" in part.place(row) else "b"
            assert f"<s>{letter}" in part.tokenizer.decode(part.examples[row].ids_T)


def test_a_prompt_in_two_files_stays_on_one_side(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{at}", "completion": "x"} for at in range(20)]
    paths = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:10])]
    kept, held = load_data(paths, tokenizer).split(0.3, seed=2)

    def prompts(part: Any) -> set[tuple[int, ...]]:
        return {tuple(prompt) for prompt in part.prompts()}

    assert not prompts(kept) & prompts(held)
    assert [len(part) >= 3 for part in held.parts] == [True, True]
    paths[1] = write(tmp_path / "b.jsonl", rows[:1])
    with pytest.raises(TrainError, match="no row is left to train on") as caught:
        load_data(paths, tokenizer).split(0.3, seed=2)
    assert "b.jsonl" in str(caught.value)


def test_one_set_of_labels(tokenizer: Any, tmp_path: Path) -> None:
    paths = [
        write(
            tmp_path / "a.jsonl", [{"text": "x", "label": "sad"}, {"text": "y", "label": "glad"}]
        ),
        write(tmp_path / "b.jsonl", [{"text": "z", "label": "mad"}]),
    ]
    data = load_data(paths, tokenizer)
    assert data.labels == ("glad", "mad", "sad")
    assert [example.label for example in data.examples] == [2, 0, 1]
    with pytest.raises(DataError) as caught:
        load_data(paths, tokenizer, labels=("glad", "sad"))
    assert caught.value.faults == [
        f'{paths[1]}, line 1: label "mad" is out of range: expected glad, sad'
    ]


def test_labels_by_position_are_decided_over_all_files(tokenizer: Any, tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": 5}]),
        write(tmp_path / "b.jsonl", [{"text": "z", "label": 0}]),
    ]
    with pytest.raises(DataError, match='line 2: label "5" is out of range: expected 0, 1'):
        load_data(paths, tokenizer, labels=("bad", "good"))
    paths[0] = write(tmp_path / "a.jsonl", [{"text": "x", "label": 1}])
    data = load_data(paths, tokenizer, labels=("bad", "good"))
    assert [example.label for example in data.examples] == [1, 0]


def test_faults_of_all_files_with_their_names(tokenizer: Any, files: list[Path]) -> None:
    for path in files:
        with path.open("a") as file:
            file.write("{oh\n")
    with pytest.raises(DataError) as caught:
        load_data(files, tokenizer)
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        f"{files[0]}, line 31",
        f"{files[1]}, line 11",
    ]


def test_schemas_that_differ_between_files_name_both(tokenizer: Any, files: list[Path]) -> None:
    other = write(files[0].parent / "c.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="different schemas") as caught:
        load_data([*files, other], tokenizer)
    assert f"{files[0]} and {other}" in str(caught.value)
    assert "kind completion and rows of kind text" in str(caught.value)


def test_a_file_that_gives_nothing_is_named(tokenizer: Any, files: list[Path]) -> None:
    empty = write(files[0].parent / "c.jsonl", [])
    with pytest.raises(DataError, match="there are no rows") as caught:
        load_data([*files, empty], tokenizer)
    assert str(empty) in str(caught.value)
    useless = write(files[0].parent / "d.jsonl", [{"prompt": "a", "completion": ""}])
    with pytest.raises(DataError, match="no row is left to train on") as caught:
        load_data([*files, useless], tokenizer)
    assert str(caught.value.where) == str(useless)
    assert caught.value.found == "1 rows: 1 empty, 0 over-long"


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1.0], "1 weights for 2 sources"),
        ([1.0, 0.0], "found: 0.0"),
        ([-1.0, 2.0], "found: -1.0"),
        ([1.0, float("inf")], "found: inf"),
    ],
)
def test_impossible_weights(
    tokenizer: Any, files: list[Path], weights: list[float], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        load_data(files, tokenizer, weights=weights)


def test_impossible_lists(tokenizer: Any, files: list[Path]) -> None:
    with pytest.raises(DataError, match="not both in one list"):
        load_data([files[0], {"text": "a"}], tokenizer)  # type: ignore[list-item, arg-type]
    with pytest.raises(DataError, match="named twice"):
        load_data([files[0], files[0]], tokenizer)
    with pytest.raises(DataError, match="there are no rows"):
        load_data([], tokenizer)
