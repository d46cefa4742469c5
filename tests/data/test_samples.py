from __future__ import annotations

from typing import Any

import pytest

from sidepath.data.dataset import load_data
from sidepath.data.portions import Portion
from sidepath.data.samples import SAMPLES, WIDTH, sample_rows


def parts(*counts: int) -> tuple[Portion, ...]:
    made, start = [], 0
    for count in counts:
        made.append(Portion("x", start, start + count))
        start += count
    return tuple(made)


@pytest.mark.parametrize(
    ("counts", "rows"),
    [
        ((9,), [0, 1, 2, 3, 4]),
        ((2,), [0, 1]),
        ((9, 9), [0, 9, 1, 10, 2]),
        ((1, 9), [0, 1, 2, 3, 4]),
        ((1,) * 7, [0, 1, 2, 3, 4]),
    ],
)
def test_samples_come_from_each_portion_in_turn(counts: tuple[int, ...], rows: list[int]) -> None:
    assert SAMPLES == 5
    assert sample_rows(parts(*counts)) == rows


def test_short_rows_are_shown_whole(tokenizer: Any) -> None:
    data = load_data([{"prompt": "a\nb", "completion": "c"}] * 7, tokenizer)
    assert data.audit.samples == ("<s>a⏎b ⟦c</s>⟧",) * 5


def test_long_rows_lose_the_middle_of_each_piece(tokenizer: Any) -> None:
    row = {"prompt": "p" * 900 + "?", "completion": "!" + "c" * 700}
    [text] = load_data([row], tokenizer).audit.samples
    assert len(text) <= WIDTH
    assert text.startswith("<s>ppp")
    assert "p? ⟦!c" in text
    assert text.endswith("c</s>⟧")
    assert text.count(" … ") == 2


def test_long_conversations_lose_turns_in_the_middle(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    talk = [
        {"role": role, "content": f"{role} {at} " + "w" * 50}
        for at in range(20)
        for role in ("user", "assistant")
    ]
    [text] = load_data([{"messages": talk}], tokenizer, max_tokens=4096).audit.samples
    assert len(text) <= WIDTH
    assert text.startswith("[user]")
    assert "…" in text
    assert text.endswith("w</s>⟧")
    assert text.count("⟦") == text.count("⟧")


def test_labels_stand_behind_the_text(tokenizer: Any) -> None:
    [text, _] = load_data(
        [{"text": "t" * 999, "label": "x" * 400}, {"text": "b", "label": "y"}], tokenizer
    ).audit.samples
    assert len(text) <= WIDTH
    assert text.endswith("x⟧")
