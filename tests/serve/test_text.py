"""Text as it comes: the pieces together are the text of all tokens, up to a stop string."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sidepath
from sidepath.errors import RequestRefused
from sidepath.serve.text import TextStream, check_stops


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(sidepath.embedded_base())


def streamed(text: str, stops: tuple[str, ...] = (), prompt: str = "Go on:") -> list[str]:
    before = tokenizer()(prompt)["input_ids"]
    stream = TextStream(tokenizer(), before, stops)
    tokens = tokenizer()(text, add_special_tokens=False)["input_ids"]
    return [*(stream.push(token) for token in tokens), stream.finish()]


texts = st.text(alphabet="ab .,é漢🙂\n", max_size=30)


@settings(max_examples=100, deadline=None)
@given(texts)
def test_pieces_are_the_whole_text(text: str) -> None:
    tokens = tokenizer()(text, add_special_tokens=False)["input_ids"]
    pieces = streamed(text)
    assert "".join(pieces) == tokenizer().decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=100, deadline=None)
@example(".aa", ["a", ".aa"])
@example("b.a", ["a", ".a"])
@given(texts, st.lists(st.text(alphabet="ab .é🙂", min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_stop_string_ends_it_wherever_tokens_part(text: str, stops: list[str]) -> None:
    whole = "".join(streamed(text))
    done = next((n for n in range(len(whole) + 1) if whole[:n].endswith(tuple(stops))), None)
    last = max((len(stop) for stop in stops if whole[:done].endswith(stop)), default=0)
    expected = whole if done is None else whole[: done - last]
    assert "".join(streamed(text, tuple(stops))) == expected


def test_what_may_be_a_stop_string_is_held_back_and_given_when_it_is_none() -> None:
    pieces = streamed("one END", stops=("ENDING",))
    assert "".join(pieces[:-1]) == "one "
    assert pieces[-1] == "END"


def test_an_unfinished_character_comes_at_the_end() -> None:
    tokens = tokenizer()("漢", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer(), [], ())
    if len(tokens) == 1:
        pytest.skip("this tokenizer has the character in one token")
    assert "".join(stream.push(token) for token in tokens[:-1]) == ""
    assert "\ufffd" in stream.finish()


def test_bad_stop_strings_are_refused_all_at_once() -> None:
    check_stops(["x"] * 16)
    with pytest.raises(RequestRefused) as error:
        check_stops(["", "y" * 257, *["x"] * 15])
    assert len(error.value.faults) == 3
