"""Texts become token ids with a mask of what is supervised.

A row that does not fit is cut or dropped, and each case is counted; see `Data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepath.data.chat import Rendered, render
from sidepath.data.example import Example
from sidepath.data.rows import Schema
from sidepath.data.sources import Row, Source
from sidepath.errors import DataError


@dataclass
class Dropped:
    """Rows that are not among the examples, by reason."""

    empty: int = 0
    over_long: int = 0


def total(parts: Sequence[Dropped]) -> Dropped:
    """Dropped rows of several sources together."""
    return Dropped(sum(one.empty for one in parts), sum(one.over_long for one in parts))


def pad_id_of(tokenizer: Any) -> int:
    """The padding token: the tokenizer's, or its end token, or 0."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the ids it starts and ends a text with, and the longest row allowed."""

    tokenizer: Any
    max_tokens: int

    @property
    def start_ids(self) -> list[int]:
        """What the tokenizer puts before a text (often one begin token, or nothing)."""
        ids: list[int] = list(self.tokenizer("")["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    @property
    def end_id(self) -> int:
        """The end token; a `DataError` when the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end token, so the model could never learn to stop",
                hint="set tokenizer.eos_token",
            )
        return int(self.tokenizer.eos_token_id)

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without the tokenizer's own start and end."""
        if not texts:
            return []
        result: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return result

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, as training sees them: the start, then the text."""
        start = self.start_ids
        return [start + ids for ids in self.batch(texts)]


def encode(
    encoder: Encoder,
    source: Source,
    rows: Sequence[Row],
    schema: Schema,
    class_of: Sequence[int],
    dropped: Dropped,
) -> list[Example]:
    """The examples of checked rows; those that are none are counted in `dropped`.

    Rows that cannot be rendered become faults of `source`.
    """
    if schema == "classify":
        return _classified(encoder, rows, class_of, dropped)
    if schema == "completion":
        return _completions(encoder, rows, dropped)
    if schema == "text":
        return _texts(encoder, rows, dropped)
    return _chats(encoder, source, rows, dropped)


def _classified(
    encoder: Encoder, rows: Sequence[Row], class_of: Sequence[int], dropped: Dropped
) -> list[Example]:
    texts = [row.fields["text"] for row in rows]
    if not texts:
        return []
    whole = encoder.tokenizer(texts, verbose=False)["input_ids"]
    cut = encoder.tokenizer(texts, truncation=True, max_length=encoder.max_tokens, verbose=False)[
        "input_ids"
    ]
    dropped.empty += sum(not ids for ids in cut)  # a tokenizer without a frame around the text
    return [
        Example(
            np.asarray(ids, dtype=np.int64),
            np.zeros(len(ids), dtype=np.bool_),
            row.line,
            label=label,
            truncated=len(ids) < len(full),
        )
        for row, full, ids, label in zip(rows, whole, cut, class_of, strict=True)
        if ids
    ]


def _completions(encoder: Encoder, rows: Sequence[Row], dropped: Dropped) -> list[Example]:
    start, end = encoder.start_ids, encoder.end_id
    prompts = encoder.batch([row.fields["prompt"] for row in rows])
    completions = encoder.batch([row.fields["completion"] for row in rows])
    examples = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        room = encoder.max_tokens - len(start) - len(completion) - 1
        if not completion or not row.fields["completion"].strip():
            dropped.empty += 1
        elif room < min(1, len(prompt)):
            dropped.over_long += 1
        else:
            kept = prompt[max(0, len(prompt) - room) :]
            head = len(start) + len(kept)
            ids = np.array([*start, *kept, *completion, end], dtype=np.int64)
            examples.append(
                Example(
                    ids,
                    _targets(np.arange(len(ids)) >= head),
                    row.line,
                    prompt_length=head,
                    reference=row.fields["completion"],
                    truncated=len(kept) < len(prompt),
                    ends=True,
                )
            )
    return examples


def _texts(encoder: Encoder, rows: Sequence[Row], dropped: Dropped) -> list[Example]:
    start, end = encoder.start_ids, encoder.end_id
    examples = []
    for row, text in zip(rows, encoder.batch([row.fields["text"] for row in rows]), strict=True):
        if not text or not row.fields["text"].strip():
            dropped.empty += 1
            continue
        whole = [*start, *text, end]
        ids = np.array(whole[: encoder.max_tokens], dtype=np.int64)
        cut = len(ids) < len(whole)
        supervised_T = _targets(np.arange(len(ids)) >= len(start))
        examples.append(Example(ids, supervised_T, row.line, truncated=cut, ends=not cut))
    return examples


def _chats(
    encoder: Encoder, source: Source, rows: Sequence[Row], dropped: Dropped
) -> list[Example]:
    added = encoder.tokenizer.added_tokens_decoder.items()
    # The end of a turn is often a special token that is not the tokenizer's end token.
    ends = {encoder.end_id, *(token for token, known in added if known.special)}
    examples = []
    for rendered in render(encoder.tokenizer, source, rows):
        example = _fit_chat(rendered, encoder.max_tokens, ends)
        if not rendered.supervised.any():
            dropped.empty += 1
        elif example is None:
            dropped.over_long += 1
        else:
            examples.append(example)
    return examples


def _fit_chat(rendered: Rendered, max_tokens: int, ends: set[int]) -> Example | None:
    """The conversation, cut from the left; None when its last answer alone does not fit."""
    cut = max(0, len(rendered.ids) - max_tokens)
    if cut >= max(rendered.last_answer, 1):
        return None
    ids, supervised = rendered.ids[cut:], _targets(rendered.supervised[cut:])
    last_turn = ids[rendered.last_answer - cut :][supervised[rendered.last_answer - cut :]]
    return Example(
        ids,
        supervised,
        rendered.line,
        prompt_length=rendered.last_answer - cut,
        reference=rendered.reference,
        truncated=cut > 0,
        ends=any(int(token) in ends for token in last_turn[-3:]),
    )


def _targets(supervised: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask without its first token: nothing stands before it to predict it from."""
    supervised = supervised.copy()
    supervised[:1] = False
    return supervised
