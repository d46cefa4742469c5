"""Commands with wrong data: files, schemas, labels, templates, weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .conftest import write_rows
from .place import Case, Place, merge_command


def broken_line_7(place: Place) -> list[str]:
    lines = place.pairs.read_text().splitlines()
    lines[6] = '{"prompt": "a"'
    return place.train(data=place.file("d.jsonl", "\n".join(lines)))


def mixed_labels(place: Place) -> list[str]:
    rows: list[dict[str, Any]] = [
        {"text": "a b", "label": 1},
        {"text": "c d"},
        {"text": "e f", "label": [2]},
    ]
    return place.train(data=write_rows(place.here / "d.jsonl", rows))


def nothing_to_learn(place: Place) -> list[str]:
    rows = [{"prompt": "a", "completion": ""}] * 3
    return place.train(data=write_rows(place.here / "d.jsonl", rows))


def too_long_to_learn(place: Place) -> list[str]:
    return place.train("--max-tokens", 3)


def held_out_with_other_labels(place: Place) -> list[str]:
    rows = [{"text": "a", "label": 7}]
    other = write_rows(place.here / "eval.jsonl", rows)
    return place.train("--eval-data", other, data=place.labelled)


def parquet(place: Place, **columns: object) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    path = place.here / "d.parquet"
    write_table(pyarrow.table(columns), path)
    return path


def truncated_parquet(place: Place) -> list[str]:
    path = parquet(place, text=[f"row {at}" for at in range(1000)])
    path.write_bytes(path.read_bytes()[:-100])
    return place.train(data=path)


def mixed_schemas(place: Place) -> list[str]:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "b"},
        {"text": "c"},
        {"messages": []},
    ]
    return place.train(data=write_rows(place.here / "d.jsonl", rows))


def with_second(place: Place, *flags: object, rows: list[dict[str, Any]]) -> list[str]:
    return place.train("--data", write_rows(place.here / "second.jsonl", rows), *flags)


def label_out_of_range(place: Place) -> list[str]:
    rows = [{"text": "a", "label": at} for at in (0, 1, 2)]
    other = write_rows(place.here / "eval.jsonl", rows)
    return place.train("--eval-data", other, data=place.labelled)


def base_with_template(place: Place, template: str) -> Path:

    base = place.copy(place.base, "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    return base


def template_that_fails(place: Place, template: str) -> list[str]:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = write_rows(place.here / "d.jsonl", [{"messages": turns}])
    return place.train("--base", base_with_template(place, template), data=data)


GOOD: list[dict[str, Any]] = [{"prompt": "a", "completion": "b"}]


def merge_on(place: Place, data: Path) -> list[str]:
    out = place.here / "out"
    return merge_command(place, place.base, place.adapter, out, "--data", data)


DATA: dict[str, Case] = {
    "calibration file missing": (
        lambda p: merge_on(p, p.here / "none.txt"),
        ("none.txt", "No such file"),
    ),
    "calibration text that is none": (
        lambda p: merge_on(p, p.base / "model.safetensors"),
        ("of no known format", ".jsonl"),
    ),
    "calibration text without text": (
        lambda p: merge_on(p, p.file("d.txt", "\n \n")),
        ("no calibration texts", "d.txt"),
    ),
    "calibration rows without text": (
        lambda p: merge_on(p, p.file("d.jsonl", '{"text": "a"}\n{"label": 1}\n{"text": ""}\n')),
        ("line 2: no text", "line 3: no text"),
    ),
    "data file missing": (
        lambda p: p.train(data=p.here / "none.jsonl"),
        ("none.jsonl", "No such file"),
    ),
    "data file empty": (lambda p: p.train(data=p.file("d.jsonl", "")), ("no rows",)),
    "data file is a folder": (lambda p: p.train(data=p.adapter), ("adapter",)),
    "data file of no known format": (lambda p: p.train(data=p.file("d.xyz", "a")), (".xyz",)),
    "data file not text": (
        lambda p: p.train(data=p.adapter / "adapter_model.safetensors"),
        (".safetensors",),
    ),
    "broken JSON on line 7": (broken_line_7, ("line 7",)),
    "data file is a folder of a known format": (
        lambda p: p.train(data=p.copy(p.adapter, "d.jsonl")),
        ("d.jsonl", "directory"),
    ),
    "Parquet truncated": (truncated_parquet, ("d.parquet", "damaged")),
    "Parquet of wrong types": (
        lambda p: p.train(data=parquet(p, prompt=["a", "b"], completion=[1, 2])),
        ("row 1", "row 2", "expected text, found int"),
    ),
    "Parquet empty": (lambda p: p.train(data=p.file("d.parquet", "")), ("damaged, or is none",)),
    "schemas mixed in a file": (mixed_schemas, ("line 2", "line 3", "kind messages")),
    "schemas mixed between files": (
        lambda p: with_second(p, rows=[{"text": "c"}]),
        ("pairs.jsonl", "second.jsonl", "different schemas"),
    ),
    "second file broken": (
        lambda p: with_second(p, rows=[*GOOD, {"prompt": 1, "completion": "b"}]),
        ("second.jsonl, line 2",),
    ),
    "second file empty": (lambda p: with_second(p, rows=[]), ("second.jsonl", "no rows")),
    "data named twice": (lambda p: p.train("--data", p.pairs), ("named twice",)),
    "too few weights": (
        lambda p: with_second(p, "--weights", 1, rows=GOOD),
        ("1 weights for 2 sources",),
    ),
    "weight of zero": (
        lambda p: with_second(p, "--weights", "1,0", rows=GOOD),
        ("weights", "found: 0.0"),
    ),
    "weight below zero": (
        lambda p: with_second(p, "--weights", "1", "--weights=-2", rows=GOOD),
        ("weights", "found: -2.0"),
    ),
    "weight that is no number": (
        lambda p: with_second(p, "--weights", "1,x", rows=GOOD),
        ("--weights", "'x'"),
    ),
    "label out of range": (label_out_of_range, ("line 3", '"2"', "expected 0, 1")),
    "template not Jinja": (
        lambda p: template_that_fails(p, "{% if %}"),
        ("line 1", "not valid Jinja"),
    ),
    "template that raises": (
        lambda p: template_that_fails(p, "{{ raise_exception('never') }}"),
        ("line 1", "refuses the conversation: never"),
    ),
    "template that rewrites": (
        lambda p: template_that_fails(p, "{{ messages | length }}{{ messages[0].content }}"),
        ("line 1", "cannot be told from the rest"),
    ),
    "hub name malformed": (
        lambda p: p.train(data=Path("hub:nobody")),
        ("hub:nobody", "hub:OWNER/NAME"),
    ),
    "no such column": (
        lambda p: p.train(data=p.file("d.csv", "question,answer\na,b\n")),
        ("answer, question",),
    ),
    "column named wrong": (
        lambda p: p.train(
            *("--columns", "prompt=questoin", "--columns", "completion=answer"),
            data=p.file("d.csv", "question,answer\na,b\n"),
        ),
        ('"questoin"', '"question"'),
    ),
    "labels mixed": (mixed_labels, ("line 2", "line 3")),
    "completions empty": (nothing_to_learn, ("no row is left", "3 empty")),
    "completions too long": (too_long_to_learn, ("no row is left", "over-long")),
    "held-out labels unknown": (held_out_with_other_labels, ("7",)),
}
