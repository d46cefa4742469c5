"""Rows of the shared data as JSONL files that `sidepath compare` reads, in the folder asked for.

CoLA has no header and RTE two sentences; WikiSQL is packed, and its questions become prompts. The
demo's restaurants are written too, whose rows are made and not read.

    python benchmarks/comparisons/make_data.py comparison-data
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from sidepath.demo.tasks import make_tasks

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PARTS = ("train", "dev")


def cola(part: str) -> Iterator[dict[str, str]]:
    """Is a sentence good English?"""
    for line in (SHARED / "glue" / "CoLA" / f"{part}.tsv").read_text("utf-8").splitlines():
        _, label, _, sentence = line.split("\t")
        yield {"text": sentence, "label": ("unacceptable", "acceptable")[int(label)]}


def rte(part: str) -> Iterator[dict[str, str]]:
    """Does the second sentence follow from the first? Both in one text, as BERT joins them."""
    with open(SHARED / "glue" / "RTE" / f"{part}.tsv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            text = f"{row['sentence1']} [SEP] {row['sentence2']}"
            yield {"text": text, "label": row["label"]}


def wikisql(part: str) -> Iterator[dict[str, str]]:
    """A question and the SQL that answers it; the table's head is not given."""
    with gzip.open(SHARED / "wikisql" / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            yield {"prompt": f"{row['question']} SQL: ", "completion": row["sql"]}


def restaurant(part: str) -> Iterator[dict[str, str]]:
    """A restaurant's attributes and a sentence that tells them."""
    task = next(task for task in make_tasks() if task.name == "restaurant")
    yield from task.train if part == "train" else task.test


def write(rows: Iterable[dict[str, str]], place: Path) -> None:
    """One JSON object a line."""
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "comparison-data")
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        for task in (cola, rte, wikisql, restaurant):
            write(task(part), folder / f"{task.__name__}-{part}.jsonl")
    print(f"{len(PARTS) * 4} files in {folder}")


if __name__ == "__main__":
    main()
