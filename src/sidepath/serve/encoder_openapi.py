"""What an encoder's server takes and gives, as an OpenAPI document (floor 5)."""

from __future__ import annotations

from typing import Any

from sidepath.serve.openapi import TEXTS, Schema, an_object, described, post

_WHOLE: Schema = {"type": "integer", "minimum": 0}
_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}
_USAGE: Schema = an_object({"prompt_tokens": _WHOLE, "total_tokens": _WHOLE})


def encoder_document(*, pooled: bool) -> Schema:
    """The OpenAPI 3.1 document of an encoder that gives vectors (`pooled`), or classes."""
    if pooled:
        route = post("Vectors of texts.", _body(), _embeddings())
        return described({"/v1/embeddings": route})
    return described({"/v1/classify": post("Classes of texts.", _body(), _classes())})


def _body() -> Schema:
    fields: dict[str, Any] = {
        "model": {"type": "string"},
        "input": TEXTS,
        "encoding_format": {"enum": ["float", "base64"]},
        "user": {"type": "string"},
    }
    return {
        "type": "object",
        "required": ["model", "input"],
        "properties": fields,
        "additionalProperties": False,
    }


def _embeddings() -> Schema:
    vector = {
        "object": {"const": "embedding"},
        "index": _WHOLE,
        "embedding": {"anyOf": [_NUMBERS, {"type": "string"}]},
    }
    return _list(vector, {})


def _classes() -> Schema:
    found = {
        "index": _WHOLE,
        "label": {"type": "string"},
        "probs": _NUMBERS,
        "num_classes": _WHOLE,
    }
    return _list(found, {"id": {"type": "string"}, "created": _WHOLE})


def _list(each: Schema, more: Schema) -> Schema:
    return an_object(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": an_object(each)},
            "model": {"type": "string"},
            "usage": _USAGE,
            **more,
        }
    )
