"""What the server takes and gives, as an OpenAPI document (floor 5).

The fields of bodies are read off the tables and dataclasses that bodies are checked with, so that
neither knows one that the other does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sidepath import __version__
from sidepath.config import field_docs, field_types
from sidepath.serve import protocol
from sidepath.serve.changing import LoadBody, UnloadBody

Schema = dict[str, Any]
_STRINGS: Schema = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_KINDS: Mapping[str, Schema] = {
    "a string": {"type": "string"},
    "a number": {"type": "number"},
    "a whole number": {"type": "integer"},
    "true or false": {"type": "boolean"},
    "an object": {"type": "object"},
    "a string or a list of strings": _STRINGS,
}
_OF_TYPES: Mapping[Any, Schema] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int | None: {"type": ["integer", "null"]},
}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TEXTS: Schema = {
    "anyOf": [
        {"type": "string"},
        _TOKENS,
        {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, _TOKENS]}},
    ]
}
"""A string, tokens, or a list of either."""
_SPECIAL: Mapping[str, Schema] = {
    "prompt": TEXTS,
    "messages": {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
        },
    },
}
_CODES = {
    400: "The request can never be answered as it stands.",
    401: "No key, or one that was given to nobody.",
    403: "This key may not do that; or a page of another origin asks.",
    404: "No model of this name is served to this key.",
    408: "The request came too slowly.",
    409: "The name is taken; or it is of another generation by now.",
    413: "The body is too long.",
    429: "This key asks too often, or for too much at once.",
    500: "The server failed.",
    503: "No room for one request more just now.",
}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_USAGE: Schema = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        **{
            name: {"type": "integer", "minimum": 0}
            for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        },
        "prompt_tokens_details": {
            "type": "object",
            "required": ["cached_tokens"],
            "properties": {"cached_tokens": {"type": "integer", "minimum": 0}},
        },
    },
}

_LIBRARY: Schema = {
    "object": {"const": "list"},
    "base": {"type": "string"},
    "chat": {"type": "boolean"},
    "data": {"type": "array", "items": {"type": "object"}},
}
_LOAD: Schema = {
    name: {"type": "integer"}
    for name in ("waiting", "running", "rows", "slots_taken", "slots", "steps", "answered")
}


def document() -> Schema:
    """The OpenAPI 3.1 document of a language model's server."""
    return described(
        {
            "/v1/completions": post(
                "Complete prompts.",
                _body(chat=False),
                _reply("text_completion", "text"),
                streams=True,
            ),
            "/v1/chat/completions": post(
                "Answer messages.",
                _body(chat=True),
                _reply("chat.completion", "message"),
                streams=True,
            ),
            "/v1/load_lora_adapter": post(
                "Load an adapter (admin keys).", _of(LoadBody), _changed()
            ),
            "/v1/unload_lora_adapter": post(
                "Unload an adapter (admin keys); 202: some requests still run.",
                _of(UnloadBody),
                _changed(),
                also=202,
            ),
            "/v1/library": _get(
                "The adapters this key may ask, with what their folders say.", an_object(_LIBRARY)
            ),
            "/v1/load": _get("Requests, rows and slots, now.", an_object(_LOAD)),
            "/": _get("A page to try it all.", None, "text/html"),
        }
    )


def described(paths: Schema) -> Schema:
    """The document of a server with these paths, and those that every server has."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Sidepath", "version": __version__},
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _ERROR},
        },
        "security": [{}, {"key": []}],
        "paths": {
            **paths,
            "/v1/models": _get("The models this key may ask.", _models()),
            "/healthz": _get("Whether the server lives.", None),
            "/readyz": _get("Whether requests are taken.", None),
            "/metrics": _get("Counts, as Prometheus reads them.", None),
            "/openapi.json": _get("This document.", {"type": "object"}),
        },
    }


def _body(*, chat: bool) -> Schema:
    """A body's schema; a field that is null is a field that is not there."""
    special = protocol._CHAT if chat else protocol._COMPLETION
    fields = {
        name: _nullable(_SPECIAL[name] if name in _SPECIAL else _KINDS[must])
        for name, (_, must) in {**protocol._SETTINGS, **special}.items()
    }
    neutral = {name: {"enum": [None, *values]} for name, values in protocol._NEUTRAL.items()}
    needed = ["model", "messages" if chat else "prompt"]
    for name in needed:
        fields[name] = _SPECIAL.get(name, {"type": "string"})
    return {
        "type": "object",
        "required": needed,
        "properties": {**fields, **neutral},
        "additionalProperties": False,
    }


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _of(kind: type) -> Schema:
    """The schema of a body that a dataclass is built from."""
    docs = field_docs(kind)
    fields: Any = dataclasses.fields(kind)
    return {
        "type": "object",
        "required": [field.name for field in fields if field.default is dataclasses.MISSING],
        "properties": {
            name: {**_OF_TYPES[hint], "description": docs[name]}
            for name, hint in field_types(kind).items()
        },
        "additionalProperties": False,
    }


def _models() -> Schema:
    model = {
        "type": "object",
        "required": ["id", "object", "created", "owned_by", "parent"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
            "parent": {"type": ["string", "null"]},
            "generation": {"type": "integer"},
        },
    }
    return an_object({"object": {"const": "list"}, "data": {"type": "array", "items": model}})


def _reply(kind: str, said: str) -> Schema:
    texts = {"text": {"type": "string"}, "message": {"type": "object"}}
    choice = an_object(
        {
            "index": {"type": "integer"},
            "finish_reason": {"enum": ["stop", "length"]},
            "generation": {"type": ["integer", "null"]},
            said: texts[said],
        }
    )
    return an_object(
        {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": choice},
            "usage": _USAGE,
        }
    )


def _changed() -> Schema:
    return an_object(
        {
            "lora_name": {"type": "string"},
            "generation": {"type": "integer"},
            "message": {"type": "string"},
        }
    )


def an_object(properties: Schema) -> Schema:
    """An object that has all of these, and may have more."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _get(summary: str, given: Schema | None, kind: str = "text/plain") -> Schema:
    return {"get": {"summary": summary, "responses": _responses(given, kind)}}


def post(
    summary: str, taken: Schema, given: Schema, *, also: int | None = None, streams: bool = False
) -> Schema:
    """A route that takes and gives JSON; `streams`: or gives events."""
    responses = _responses(given)
    if also is not None:
        responses[str(also)] = responses["200"]
    if streams:
        responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    body = {"required": True, "content": {"application/json": {"schema": taken}}}
    return {"post": {"summary": summary, "requestBody": body, "responses": responses}}


def _responses(given: Schema | None, kind: str = "text/plain") -> Schema:
    """The responses of a route: JSON of a schema, or text of a kind."""
    kind = kind if given is None else "application/json"
    content = {kind: {"schema": {"type": "string"} if given is None else given}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    if given is None:  # a health check says in plain words that all is not well
        error = {**error, **content}
    return {
        "200": {"description": "What was asked for.", "content": content},
        **{str(code): {"description": text, "content": error} for code, text in _CODES.items()},
    }
