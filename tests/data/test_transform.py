from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch

from sidepath.data.dataset import Data, load_data
from sidepath.data.transform import identity_of
from sidepath.errors import DataError

ROWS = [{"prompt": f"p{at}", "completion": "abc"} for at in range(4)]


def noisy(fields: dict[str, Any]) -> dict[str, Any]:
    """Draws from all three global generators."""
    drawn = (random.randrange(10**6), np.random.randint(10**6), int(torch.randint(10**6, (1,))))
    return {**fields, "completion": " ".join(map(str, drawn))}


def ids(data: Data, row: int, seed: int, epoch: int) -> list[int]:
    return list(data.example(row, seed=seed, epoch=epoch).ids_T.tolist())


def test_without_a_transform_the_example_is_the_example(tokenizer: Any) -> None:
    data = load_data(ROWS, tokenizer)
    assert data.example(2, seed=0, epoch=7) is data.examples[2]
    assert data.raw is None


def test_draws_follow_from_seed_epoch_and_row_alone(tokenizer: Any) -> None:
    data = load_data(ROWS, tokenizer, transform=noisy)
    first = ids(data, 1, 5, 2)
    random.seed(1)
    assert ids(data, 1, 5, 2) == first
    others = [ids(data, 1, 5, 3), ids(data, 1, 6, 2), ids(data, 2, 5, 2)]
    assert first not in others
    state = random.getstate()
    ids(data, 0, 0, 0)
    assert random.getstate() == state
    assert data.tokenizer.decode(data.examples[1].ids_T) == "<s>p1abc</s>"


def test_a_transform_cannot_reach_the_kept_rows(tokenizer: Any) -> None:
    def grows(fields: dict[str, Any]) -> dict[str, Any]:
        fields["messages"].append({"role": "assistant", "content": "more"})
        return fields

    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = load_data([{"messages": talk}], tokenizer, transform=grows)
    assert ids(data, 0, 0, 0) == ids(data, 0, 0, 1)
    assert len(talk) == 2


@pytest.mark.parametrize(
    ("transform", "says"),
    [
        (lambda _: {"prompt": "a"}, 'no "completion"'),
        (lambda _: {"prompt": "a", "completion": " "}, "1 empty"),
        (lambda _: {"prompt": "a", "completion": "x" * 99}, "1 over-long"),
        (lambda _: {"prompt": "a", "completion": 3}, "found int"),
        (lambda _: None, "found NoneType"),
        (lambda fields: fields["absent"], "KeyError"),
    ],
)
def test_a_transform_that_breaks_a_row_names_it(tokenizer: Any, transform: Any, says: str) -> None:
    data = load_data(ROWS, tokenizer, max_tokens=20, transform=transform)
    with pytest.raises(DataError, match=says) as caught:
        data.example(2, seed=0, epoch=0)
    assert "the given rows, row 3" in str(caught.value)


def test_labels_stay_what_they_were(tokenizer: Any) -> None:
    rows = [{"text": "a", "label": name} for name in ("x", "y", "z")]
    data = load_data(rows, tokenizer, transform=lambda fields: {**fields, "text": "b"})
    assert [data.example(row, seed=0, epoch=0).label for row in range(3)] == [0, 1, 2]
    wrong = load_data(rows, tokenizer, transform=lambda fields: {**fields, "label": "w"})
    with pytest.raises(DataError, match="out of range"):
        wrong.example(0, seed=0, epoch=0)


def test_a_transform_stays_with_its_rows_through_a_split(tokenizer: Any) -> None:
    data = load_data(ROWS, tokenizer, transform=noisy)
    kept, held = data.split(0.25, seed=0)
    for part in (kept, held):
        for row in range(len(part)):
            example = part.example(row, seed=0, epoch=0)
            prompt = part.examples[row].ids_T[:3]
            assert np.array_equal(example.ids_T[:3], prompt)
            assert example.reference != "abc"


def test_identity_tells_rows_weights_and_transform_apart(tokenizer: Any) -> None:
    plain = load_data(ROWS, tokenizer)
    assert plain.identity == {"digest": plain.digest, "weights": None, "transform": None}
    changed = load_data(ROWS, tokenizer, transform=noisy).identity
    assert changed["digest"] == plain.digest
    assert changed["transform"]["name"].endswith("test_transform.noisy")
    assert len(changed["transform"]["source"]) == 64
    more = load_data([{**row, "more": 1} for row in ROWS], tokenizer, transform=noisy).identity
    assert more["digest"] == plain.digest
    assert more["transform"]["source"] == changed["transform"]["source"]
    assert more["transform"]["rows"] != changed["transform"]["rows"]
    other = identity_of(lambda fields: fields, [])
    assert other["source"] not in (None, changed["transform"]["source"])


def test_identity_without_source() -> None:
    made: dict[str, Any] = {"__name__": "typed"}
    exec("def f(fields):\n    return fields", made)
    found = identity_of(made["f"], [])
    assert (found["name"], found["source"]) == ("typed.f", None)
    assert identity_of(functools.partial(noisy), [])["name"] == "functools.partial"
