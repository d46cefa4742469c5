"""Three small tasks that the embedded base cannot do until it is adapted.

Each is made by a generator in plain Python, so nothing is downloaded and the same seed
always gives the same rows.  They follow the spirit of three well-known benchmarks:
describing a restaurant from its attributes (E2E NLG), turning a question into SQL
(WikiSQL), and judging a short review (SST-2).  All three are written as a prompt and a
completion, so one base model serves them all and adapters can share a batch.

Rows are split by *key*: the combination that the task turns on.  A key belongs to the
training rows or to the test rows, never to both.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

Row = dict[str, str]
Key = tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One task: its rows, how it is scored, and settings that were found to work."""

    name: str
    metric: str  # "bleu", "exact_match" or "accuracy", each from 0 to 100
    train: list[Row]
    test: list[Row]
    description: str
    steps: int
    batch_size: int
    max_new_tokens: int
    lora_learning_rate: float
    full_learning_rate: float


def _several(text: str) -> list[str]:
    """The words of ``text``: long lists read better as running text."""
    return text.split()


# --- restaurant ---------------------------------------------------------------------------

NAME_FIRST = _several("Golden Silver Old Little Royal Hidden Lucky Merry Copper Rusty Quiet Brave")
NAME_LAST = _several(
    "Lamp Anchor Lion Swan Fox Kettle Mill Rose Lantern Spoon Wheel Whale Crown Oak"
)
FOODS = _several("Italian French Indian Thai Greek Turkish Mexican Chinese Japanese Spanish")
PRICES = ("cheap", "fairly priced", "expensive", "")
AREAS = ("by the river", "in the city centre", "up in the hills", "")
RATINGS = ("5 of 5", "4 of 5", "3 of 5", "1 of 5", "")
FAMILIES = {"yes": "children are welcome", "no": "children are not welcome", "": ""}


def _venue(rng: Random) -> str:
    return f"The {rng.choice(NAME_FIRST)} {rng.choice(NAME_LAST)}"


def restaurant_sentence(values: dict[str, str]) -> str:
    """The one right sentence for the attributes; a missing attribute is left unsaid."""
    thing = f"{values['price']} {values['food']} restaurant".strip()
    article = "an" if thing[0].lower() in "aeiou" else "a"
    sentence = f"{values['name']} is {article} {thing} {values['area']}".rstrip()
    if values["rating"]:
        sentence += f", rated {values['rating']}"
    families = FAMILIES[values["families"]]
    return f"{sentence}, where {families}." if families else f"{sentence}."


def _restaurant(rng: Random) -> tuple[Key, Row]:
    values = {
        "name": _venue(rng),
        "price": rng.choice(PRICES),
        "food": rng.choice(FOODS),
        "area": rng.choice(AREAS),
        "rating": rng.choice(RATINGS),
        "families": rng.choice(list(FAMILIES)),
    }
    given = " | ".join(f"{key} = {value}" for key, value in values.items() if value)
    row = {"prompt": f"{given}\nsentence:", "completion": f" {restaurant_sentence(values)}"}
    return tuple(value for key, value in values.items() if key != "name"), row


# --- sql ----------------------------------------------------------------------------------

CITIES = _several(
    "Oslo Paris Rome Lima Cairo Delhi Tokyo Berlin Madrid Lisbon Vienna Prague Dublin"
)
PEOPLE = _several(
    "Anna Tom Mira Ben Clara Omar Lena Jack Nora Felix Ivy Hugo Sara Leo Ruth Max Ella"
)
TABLES = {
    "hotels": ("city", "owner", "stars", "rooms", "price"),
    "players": ("team", "coach", "goals", "age", "height"),
    "books": ("author", "language", "pages", "year", "price"),
    "ships": ("captain", "city", "length", "year", "speed"),
    "schools": ("city", "teacher", "rank", "age", "floors"),
    "films": ("artist", "country", "length", "year", "score"),
}
TEXT_VALUES = {
    **dict.fromkeys(("city", "team"), CITIES),
    **dict.fromkeys(("owner", "coach", "author", "captain", "teacher", "artist"), PEOPLE),
    "language": FOODS,
    "country": _several(
        "Norway France Italy Peru Egypt India Japan Spain Greece Korea Poland Kenya"
    ),
}
ASKED = {
    "": "what is the {column} of {table}",
    "COUNT": "how many {table} are there",
    "MAX": "what is the highest {column} of {table}",
    "MIN": "what is the lowest {column} of {table}",
    "AVG": "what is the average {column} of {table}",
}
COMPARED = {"=": ("is",), ">": ("is over", "is more than"), "<": ("is under", "is less than")}


def _condition(rng: Random, column: str) -> tuple[str, str, str]:
    """A condition in SQL, the same in words, and its operator."""
    if column in TEXT_VALUES:
        value = rng.choice(TEXT_VALUES[column])
        return f"{column} = '{value}'", f"{column} is {value}", "="
    operator, value = rng.choice(list(COMPARED)), str(rng.randrange(2, 400))
    return (
        f"{column} {operator} {value}",
        f"{column} {rng.choice(COMPARED[operator])} {value}",
        operator,
    )


def _sql(rng: Random) -> tuple[Key, Row]:
    table = rng.choice(list(TABLES))
    columns, function = TABLES[table], rng.choice(list(ASKED))
    column = rng.choice(columns[2:] if function in ("MAX", "MIN", "AVG") else columns)
    used = rng.sample([c for c in columns if c != column], rng.choice((1, 1, 2)))
    conditions = [_condition(rng, name) for name in used]
    selected = {"": column, "COUNT": "COUNT(*)"}.get(function, f"{function}({column})")
    question = ASKED[function].format(column=column, table=table)
    question += " whose " + " and ".join(words for _, words, _ in conditions)
    where = " AND ".join(sql for sql, _, _ in conditions)
    row = {
        "prompt": f"table: {table} ({', '.join(columns)})\nquestion: {question}?\nsql:",
        "completion": f" SELECT {selected} FROM {table} WHERE {where}",
    }
    return (table, selected, *used, *(operator for _, _, operator in conditions)), row


# --- sentiment ----------------------------------------------------------------------------

THINGS = _several(
    "soup waiter room view film plot concert meal dessert coffee hotel story garden menu book"
)
GOOD = _several(
    "good great superb lovely wonderful excellent delightful charming brilliant fresh kind perfect "
    "pleasant tasty clever funny gripping elegant amazing enjoyable"
)
BAD = _several(
    "bad poor awful terrible dreadful horrible boring dull stale rude dirty bland clumsy tedious "
    "weak disappointing shabby careless mediocre lazy"
)
# {s} is a word of the review's own polarity, {o} one of the other; {a} and {b} are things.
# Most reviews say it outright, as people do; the rest
# set a word aside or deny it.
SKELETONS = (
    "the {a} was {s}",
    "the {a} was {s} and {s2}",
    "what {article} {s} {a}",
    "I found the {a} {s}",
    "{s} {a}, {s2} {b}",
    "such {article} {s} {a}, and the {b} was {s2} too",
    "everyone said the {a} was {s}, and it was {s2}",
    "{article} {s} {a} with {article2} {s2} {b}",
    "the {a} was {o}, but the {b} was {s} and {s2}",
    "the {a} was not {o} but {s}, and the {b} was {s2}",
)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _sentiment(rng: Random) -> tuple[Key, Row]:
    label = rng.choice(("positive", "negative"))
    same, other = (GOOD, BAD) if label == "positive" else (BAD, GOOD)
    skeleton = rng.choice(SKELETONS)
    (own, second), opposite = rng.sample(same, 2), rng.choice(other)
    thing, beside = rng.sample(THINGS, 2)
    words = {"s": own, "s2": second, "o": opposite, "a": thing, "b": beside}
    text = skeleton.format(**words, article=_article(own), article2=_article(second))
    used = tuple(words[name] for name in ("s", "s2", "o") if "{" + name + "}" in skeleton)
    return (skeleton, *used), {"prompt": f"review: {text}.\nsentiment:", "completion": f" {label}"}


# --- splitting ----------------------------------------------------------------------------


def _is_test(key: Key) -> bool:
    """Whether a key is kept for testing: one in four, whatever the seed."""
    return zlib.crc32("|".join(key).encode()) % 4 == 0


def _rows(
    make: Callable[[Random], tuple[Key, Row]], rng: Random, count: int, test: bool
) -> list[Row]:
    """``count`` different rows whose keys are on the wanted side of the split."""
    found: dict[str, Row] = {}
    while len(found) < count:
        key, row = make(rng)
        if _is_test(key) == test:
            found[row["prompt"]] = row
    return list(found.values())


MAKERS = {"restaurant": _restaurant, "sql": _sql, "sentiment": _sentiment}
# Learning rates from a small sweep on rows of another seed (docs/log.md); the steps are what a
# demo of two minutes can afford, the same for LoRA and for full fine-tuning.
SETTINGS: dict[str, dict[str, Any]] = {
    "restaurant": {
        "metric": "bleu",
        "description": "attributes of a restaurant -> one sentence",
        "lora_learning_rate": 1e-2,
        "full_learning_rate": 2e-3,
        "steps": 90,
        "batch_size": 16,
        "max_new_tokens": 48,
    },
    "sql": {
        "metric": "exact_match",
        "description": "a table and a question -> one SQL statement",
        "lora_learning_rate": 1e-2,
        "full_learning_rate": 2e-3,
        "steps": 65,
        "batch_size": 16,
        "max_new_tokens": 32,
    },
    "sentiment": {
        "metric": "accuracy",
        "description": "a short review -> positive or negative",
        "lora_learning_rate": 3e-3,
        "full_learning_rate": 1e-3,
        "steps": 85,
        "batch_size": 32,
        "max_new_tokens": 5,
    },
}


def make_tasks(seed: int = 0, train_rows: int = 2000, test_rows: int = 200) -> list[Task]:
    """The three tasks, each with its own training and test rows."""
    tasks = []
    for name, make in MAKERS.items():
        train = _rows(make, Random(f"{name} train {seed}"), train_rows, test=False)
        test = _rows(make, Random(f"{name} test {seed}"), test_rows, test=True)
        tasks.append(Task(name=name, train=train, test=test, **SETTINGS[name]))
    return tasks
