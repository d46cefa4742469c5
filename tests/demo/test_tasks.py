"""The demo's task generators: deterministic, honestly split, and right by their own rules."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from sidepath.demo import tasks
from sidepath.demo.tasks import Task, make_tasks


@pytest.fixture(scope="module")
def made() -> dict[str, Task]:
    """The three tasks by name."""
    return {task.name: task for task in make_tasks(seed=0, train_rows=400, test_rows=150)}


def test_the_three_tasks_have_the_asked_number_of_rows(made: dict[str, Task]) -> None:
    assert list(made) == ["restaurant", "sql", "sentiment"]
    assert [task.metric for task in made.values()] == ["bleu", "exact_match", "accuracy"]
    for task in made.values():
        assert (len(task.train), len(task.test)) == (400, 150)
        assert task.description


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    first, again, other = (make_tasks(seed, 50, 20) for seed in (3, 3, 4))
    assert first == again
    for one, two in zip(first, other, strict=True):
        assert one.train != two.train
        assert one.test != two.test


def test_more_training_rows_only_add_to_the_fewer() -> None:
    for few, many in zip(make_tasks(1, 20, 10), make_tasks(1, 60, 10), strict=True):
        assert many.train[:20] == few.train
        assert many.test == few.test


@pytest.mark.parametrize("name", ["restaurant", "sql", "sentiment"])
def test_rows_are_distinct_prompt_and_completion_strings(made: dict[str, Task], name: str) -> None:
    rows = made[name].train + made[name].test
    assert all(set(row) == {"prompt", "completion"} for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows)
    # The library tokenises the two parts apart, so the border must not run through a word.
    assert all(row["prompt"].endswith(":") for row in rows)
    assert all(re.match(r" \S", row["completion"]) for row in rows)


def _restaurant_key(row: dict[str, str]) -> str:
    return re.sub(r"(name|near)\[[^\]]*\]", "", row["prompt"]).rstrip(", \n")


def _sql_key(row: dict[str, str]) -> str:
    return re.sub(r"'[^']*'|\d+", "?", row["completion"])


def _sentiment_key(row: dict[str, str]) -> str:
    text = row["prompt"]
    for thing in tasks.THINGS:
        text = re.sub(rf"\b{thing}\b", "thing", text)
    return text


@pytest.mark.parametrize(
    ("name", "key"),
    [("restaurant", _restaurant_key), ("sql", _sql_key), ("sentiment", _sentiment_key)],
)
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_train_and_test_share_no_combination(
    name: str, key: Callable[[dict[str, str]], str], seed: int
) -> None:
    task = next(task for task in make_tasks(seed, 800, 200) if task.name == name)
    assert {key(row) for row in task.train}.isdisjoint(key(row) for row in task.test)


def test_combinations_stay_on_their_side_for_every_seed() -> None:
    # Adapters trained with one seed may be tested on another seed's rows.
    train = make_tasks(0, 600, 10)
    test = make_tasks(5, 10, 200)
    for one, other, key in zip(
        train, test, (_restaurant_key, _sql_key, _sentiment_key), strict=True
    ):
        assert {key(row) for row in one.train}.isdisjoint(key(row) for row in other.test)


def _values(**given: str) -> dict[str, str]:
    names = ("name", "food", "price", "area", "rating", "families")
    return {name: given.get(name, "") for name in names}


@pytest.mark.parametrize(
    ("families", "ending"), [("yes", "children are welcome"), ("no", "children are not welcome")]
)
def test_what_is_known_of_rating_and_families_is_said_last(families: str, ending: str) -> None:
    values = _values(name="The Old Mill", food="Thai", rating="3 of 5", families=families)
    expected = f"The Old Mill is a Thai restaurant, rated 3 of 5, where {ending}."
    assert tasks.restaurant_sentence(values) == expected


def test_a_restaurant_with_little_known_gets_a_short_sentence() -> None:
    values = _values(name="The Old Mill", food="Indian")
    assert tasks.restaurant_sentence(values) == "The Old Mill is an Indian restaurant."


def test_every_given_name_stands_in_the_sentence(made: dict[str, Task]) -> None:
    for row in made["restaurant"].test:
        given = re.findall(r"(?:name|price|food|area|rating) = ([^|\n]*\w)", row["prompt"])
        assert len(given) >= 2
        assert all(value in row["completion"] for value in given)


def test_sql_uses_only_the_columns_and_values_of_its_prompt(made: dict[str, Task]) -> None:
    for row in made["sql"].test:
        prompt = re.match(r"table: (\w+) \(([^)]*)\)", row["prompt"])
        statement = re.fullmatch(
            r" SELECT (?:[A-Z]+\()?([\w*]+)\)? FROM (\w+) WHERE (.+)", row["completion"]
        )
        assert prompt is not None
        assert statement is not None
        table, columns = prompt.groups()
        selected, source, where = statement.groups()
        assert source == table
        assert selected in [*columns.split(", "), "*"]
        for condition in where.split(" AND "):
            column, _, value = condition.split(" ", 2)
            assert column in columns.split(", ")
            assert value.strip("'") in row["prompt"]


def test_sentiment_is_balanced_and_words_alone_do_not_decide_it(made: dict[str, Task]) -> None:
    rows = make_tasks(0, 2000, 10)[2].train
    labels = [row["completion"] for row in rows]
    assert set(labels) == {" positive", " negative"}
    assert 0.45 < labels.count(" positive") / len(labels) < 0.55
    # Contrast and denial: a list of good words gets most reviews right, as in life, not all.
    guesses = [
        " positive" if any(f" {word}" in row["prompt"] for word in tasks.GOOD) else " negative"
        for row in rows
    ]
    right = sum(guess == label for guess, label in zip(guesses, labels, strict=True))
    assert 0.8 < right / len(rows) < 0.95


def test_the_settings_are_usable(made: dict[str, Task]) -> None:
    for task in made.values():
        assert task.lora_learning_rate > task.full_learning_rate > 0
        assert min(task.steps, task.batch_size, task.max_new_tokens) > 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The tokenizer of the embedded base."""
    return Tokenizer.from_file(str(Path(tasks.__file__).parents[1] / "base" / "tokenizer.json"))


@pytest.mark.parametrize("name", ["restaurant", "sql", "sentiment"])
def test_prompt_and_completion_have_the_same_tokens_together_and_apart(
    made: dict[str, Task], tokenizer: Tokenizer, name: str
) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for row in made[name].test:
        both = row["prompt"] + row["completion"]
        assert ids(row["prompt"]) + ids(row["completion"]) == ids(both)
        assert tokenizer.decode(ids(both)) == both
        assert len(ids(row["completion"])) < made[name].max_new_tokens
