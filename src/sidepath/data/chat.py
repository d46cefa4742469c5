"""Conversations through the tokenizer's chat template; the assistant's turns are supervised.

The whole conversation is rendered and tokenised once, as a server would; the mask comes from
the template's own `{% generation %}` marks, or else from rendering every prefix of the
conversation and taking what each assistant turn adds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepath.data.sources import Row, Source
from sidepath.errors import DataError

Messages = Sequence[Mapping[str, Any]]
Spans = list[tuple[int, int]]
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


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
    found = []
    for row in rows:
        try:
            found.append(_rendered(tokenizer, row))
        except DataError as error:
            source.fault(row.line, error.what)
    return found


def _rendered(tokenizer: Any, row: Row) -> Rendered:
    marked = _MARK.search(_template(tokenizer, row)) is not None
    ids, supervised = (_marked if marked else _by_prefix)(tokenizer, row)
    starts = np.flatnonzero(supervised & ~np.concatenate(([False], supervised[:-1])))
    last = int(starts[-1]) if len(starts) else 0
    answers = [turn for turn in row.fields["messages"] if turn["role"] == "assistant"]
    return Rendered(ids, supervised, last, _reference(answers[-1]), row.line)


def _reference(answer: Mapping[str, Any]) -> str:
    """An answer as text; one that is tool calls alone is compared as their JSON."""
    if answer.get("content") is not None:
        return str(answer["content"])
    return json.dumps([call["function"] for call in answer["tool_calls"]], ensure_ascii=False)


def _template(tokenizer: Any, row: Row) -> str:
    """The template that these messages go through; a tokenizer may have one for tools apart."""
    try:
        return str(tokenizer.get_chat_template(tools=row.fields.get("tools")))
    except ValueError as error:
        raise DataError(f"the tokenizer has no chat template to use: {_reason(error)}") from error


def _marked(tokenizer: Any, row: Row) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    encoded = _applied(
        tokenizer,
        row.fields["messages"],
        row.fields.get("tools"),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    supervised = np.asarray(encoded["assistant_masks"], dtype=np.bool_)
    # Many templates mark the words of an answer and not the end token behind them.
    after = np.concatenate(([False], supervised[:-1]))
    return ids, supervised | (after & (ids == tokenizer.eos_token_id))


def _by_prefix(tokenizer: Any, row: Row) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    messages, tools = row.fields["messages"], row.fields.get("tools")
    text = _text(tokenizer, messages, tools)
    spans = _answer_spans(tokenizer, messages, tools, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    supervised = np.zeros(len(offsets), dtype=np.bool_)
    for start, stop in spans:
        # A token that begins before an answer and ends in it holds its first characters.
        supervised |= (offsets[:, 1] > start) & (offsets[:, 1] <= stop)
    return np.asarray(encoded["input_ids"], dtype=np.int64), supervised


def _answer_spans(tokenizer: Any, messages: Messages, tools: Any, text: str) -> Spans:
    spans = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if at == 0:
            raise DataError(
                "message 1: a conversation that starts with an answer needs a chat template with "
                "{% generation %} marks"
            )
        before = _text(tokenizer, messages[:at], tools, add_generation_prompt=True)
        after = _text(tokenizer, messages[: at + 1], tools)
        if not after.startswith(before) or not text.startswith(after):
            raise DataError(
                f"message {at + 1}: the chat template renders the conversation up to here in "
                "another way once more follows, so the answer cannot be told from the rest"
            )
        spans.append((len(before), len(after)))
    return spans


def _text(
    tokenizer: Any, messages: Messages, tools: Any, *, add_generation_prompt: bool = False
) -> str:
    return str(
        _applied(
            tokenizer,
            messages,
            tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    )


def _applied(tokenizer: Any, messages: Messages, tools: Any, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), tools=tools, **options)
    # A template is a program of its author's: it may fail in any way a program can.
    except Exception as error:
        raise DataError(f"the chat template refuses the conversation: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    import jinja2

    text = str(error).strip().partition("\n")[0]
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"not valid Jinja, line {error.lineno}: {text}"
    known = isinstance(error, (jinja2.TemplateError, ValueError)) and text
    return text if known else f"{type(error).__name__}: {text}"
