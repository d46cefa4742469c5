"""Answers of a given form: JSON, or JSON of a schema (floor 5; llguidance, extra `serve`).

The library says which tokens may come next; the others get no probability. Whitespace is that of
`json.dumps`, or a model could write spaces for ever; a schema's own "x-guidance" may say otherwise.

Dimensions: V vocabulary.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidepath.errors import RequestRefused, ServeError

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_SPACES: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Progress:
    """How far one answer of the form has come. A token that is not allowed must not be taken."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> Tensor:
        """Which tokens may come next (V,). Errors: `ServeError` where the library gives up."""
        raw = self._matcher.compute_bitmask()
        self._refuse_error()
        bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder="little")
        allowed_V = torch.zeros(vocabulary, dtype=torch.bool)
        known = min(vocabulary, len(bits))
        allowed_V[:known] = torch.from_numpy(bits[:known]).bool()
        return allowed_V

    def take(self, token: int) -> bool:
        """Go on by a token; returns whether the answer is whole and nothing more can come."""
        self._matcher.consume_token(token)
        self._refuse_error()
        return bool(self._matcher.is_stopped())

    def _refuse_error(self) -> None:
        if self._matcher.is_error():
            raise ServeError("the form cannot be followed", found=self._matcher.get_error()[:300])


class Form:
    """A form that was understood, for answers by one tokenizer."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def begin(self) -> Progress:
        """A new answer."""
        return Progress(self._matcher.deep_copy())


def form_of(tokenizer: Any, schema: Mapping[str, Any]) -> Form:
    """The form that a JSON schema describes.

    Errors: `RequestRefused` for a schema that cannot be followed, and where llguidance is not
    installed or does not know the tokenizer.
    """
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError as error:
        raise RequestRefused(
            "response_format needs llguidance, which this server does not have",
            found=str(error),
            hint="pip install 'sidepath[serve]' where it runs",
        ) from error
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_SPACES)
        known = _tokens_of(tokenizer)
    except ValueError as error:
        raise RequestRefused("response_format cannot be followed", found=error) from error
    matcher = LLMatcher(known, grammar, log_level=0)
    if matcher.is_error():
        raise RequestRefused(
            "response_format has a schema that cannot be followed", found=matcher.get_error()[:500]
        )
    return Form(matcher)


def asked_form(asked: Mapping[str, Any], tokenizer: Any) -> Form | None:
    """What OpenAI's `response_format` asks for; None: any text. Errors: as `form_of`."""
    kind, given = asked.get("type"), asked.get("json_schema")
    if kind == "text":
        return None
    schema = ANY_OBJECT if kind == "json_object" else None
    if kind == "json_schema" and isinstance(given, dict):
        schema = given.get("schema")
    if not isinstance(schema, Mapping):
        raise RequestRefused(
            "response_format cannot be read",
            expected='{"type": "text"}, {"type": "json_object"}, or '
            '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}',
        )
    return form_of(tokenizer, schema)


@functools.lru_cache(maxsize=4)
def _tokens_of(tokenizer: Any) -> Any:
    """What llguidance knows of a tokenizer: made once, since it takes long."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer)
