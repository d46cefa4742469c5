"""Conversations through the tokenizer's chat template; the assistant's turns are supervised.

The whole conversation is rendered and tokenised once, as a server would; the mask comes from
the template's own `{% generation %}` marks, or else from rendering every prefix of the
conversation and taking what each assistant turn adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepath.errors import DataError
from sidepath.training.sources import Row, Source

Messages = Sequence[Mapping[str, Any]]
Spans = list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Rendered:
    """One conversation as tokens, not cut yet."""

    ids: NDArray[np.int64]
    supervised: NDArray[np.bool_]
    last_answer: int
    """Index of the first token of the last answer."""
    reference: str
    line: int


def render(tokenizer: Any, source: Source, rows: Sequence[Row]) -> list[Rendered]:
    """The conversations as tokens with masks; rows the template refuses become faults.

    Raises:
        DataError: the tokenizer has no chat template, or cannot say where tokens come from.
    """
    if not tokenizer.chat_template:
        raise DataError(
            'the rows hold "messages" and the tokenizer has no chat template',
            where=source.name,
            hint="set tokenizer.chat_template, or give prompt and completion",
        )
    if not tokenizer.is_fast:
        raise DataError("chat data need a tokenizer of the tokenizers library (a fast one)")
    marked = "{% generation %}" in str(tokenizer.chat_template).replace("{%-", "{%")
    one = _marked if marked else _by_prefix
    return [found for row in rows if (found := _guarded(one, tokenizer, source, row)) is not None]


def _guarded(one: Any, tokenizer: Any, source: Source, row: Row) -> Rendered | None:
    import jinja2

    try:
        rendered: Rendered = one(tokenizer, row)
    except DataError as error:
        source.fault(row.line, error.what)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        source.fault(row.line, f"the chat template refuses the conversation: {error}")
    else:
        return rendered
    return None


def _marked(tokenizer: Any, row: Row) -> Rendered:
    encoded = tokenizer.apply_chat_template(
        list(row.fields["messages"]),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    supervised = np.asarray(encoded["assistant_masks"], dtype=np.bool_)
    return _rendered(np.asarray(encoded["input_ids"], dtype=np.int64), supervised, row)


def _by_prefix(tokenizer: Any, row: Row) -> Rendered:
    messages = row.fields["messages"]
    text = _text(tokenizer, messages)
    spans = _answer_spans(tokenizer, messages, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    supervised = np.zeros(len(offsets), dtype=np.bool_)
    for start, stop in spans:
        # A token that begins before an answer and ends in it holds its first characters.
        supervised |= (offsets[:, 1] > start) & (offsets[:, 1] <= stop)
    return _rendered(np.asarray(encoded["input_ids"], dtype=np.int64), supervised, row)


def _answer_spans(tokenizer: Any, messages: Messages, text: str) -> Spans:
    spans = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _text(tokenizer, messages[:at], add_generation_prompt=True)
        after = _text(tokenizer, messages[: at + 1])
        if not after.startswith(before) or not text.startswith(after):
            raise DataError(
                f"message {at + 1}: the chat template renders the conversation up to here in "
                "another way once more follows, so the answer cannot be told from the rest"
            )
        spans.append((len(before), len(after)))
    return spans


def _text(tokenizer: Any, messages: Messages, *, add_generation_prompt: bool = False) -> str:
    if not messages and not add_generation_prompt:
        return ""
    return str(
        tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _rendered(ids: NDArray[np.int64], supervised: NDArray[np.bool_], row: Row) -> Rendered:
    starts = np.flatnonzero(supervised & ~np.concatenate(([False], supervised[:-1])))
    answers = [turn["content"] for turn in row.fields["messages"] if turn["role"] == "assistant"]
    last = int(starts[-1]) if len(starts) else 0
    return Rendered(ids, supervised, last, str(answers[-1]), row.line)
