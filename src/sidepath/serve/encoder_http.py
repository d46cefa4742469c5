"""An encoder behind HTTP: OpenAI's `/v1/embeddings`, and `/v1/classify` (floor 5; extra `serve`).

`model` names an adapter, or the base; a name that is neither is 404. Texts of one body are answered
by one adapter; those of many bodies share calls of the model.
"""

from __future__ import annotations

import asyncio
import base64
import math
import secrets
import struct
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sidepath.errors import RequestRefused
from sidepath.serve.about import About
from sidepath.serve.bodies import Intake
from sidepath.serve.encoder_openapi import encoder_document
from sidepath.serve.encoders import Encoder
from sidepath.serve.gate import Gate, caller_of
from sidepath.serve.metrics import Counted, OfEncoder
from sidepath.serve.names import Names
from sidepath.serve.protocol import body_of
from sidepath.serve.versions import Version

MOST_TEXTS = 2048
"""Texts of one body, as OpenAI has it."""
_KNOWN = ("model", "input", "encoding_format", "dimensions", "user")


def application(encoder: Encoder, base: str, gate: Gate | None = None) -> Starlette:
    """The application of an encoder's server, behind the same gate as a language model's. `base` is
    the name that asks for the base alone.
    """
    served = _Served(encoder, base)
    pooled = encoder.encoding.pooling is not None
    own = (
        Route("/v1/embeddings", served.embeddings, methods=["POST"])
        if pooled
        else Route("/v1/classify", served.classify, methods=["POST"])
    )
    counted = Counted(OfEncoder(encoder))
    about = About(encoder, served.names, counted, encoder_document(pooled=pooled))
    return about.application([own], gate if gate is not None else Gate())


class _Served:
    def __init__(self, encoder: Encoder, base: str) -> None:
        self.encoder, self.intake = encoder, Intake()
        self.names = Names(encoder.adapters, base, encoder.alone)
        names: Mapping[int, str] = encoder.encoding.model.config.id2label
        self.labels = [names[number] for number in sorted(names)]

    async def embeddings(self, incoming: Incoming) -> Response:
        body, rows, tokens, _ = await self._answered(incoming)
        packed = body.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": _packed(row) if packed else row}
            for index, row in enumerate(rows)
        ]
        return JSONResponse(
            {"object": "list", "data": data, "model": body["model"], "usage": _usage(tokens)}
        )

    async def classify(self, incoming: Incoming) -> Response:
        body, rows, tokens, version = await self._answered(incoming)
        labels = self.labels if version is None or version.labels is None else version.labels
        data = []
        for index, logits in enumerate(rows):
            probabilities = softmax(logits)
            best = max(range(len(logits)), key=probabilities.__getitem__)
            data.append(
                {
                    "index": index,
                    "label": labels[best],
                    "probs": probabilities,
                    "num_classes": len(logits),
                }
            )
        return JSONResponse(
            {
                "id": f"classify-{secrets.token_hex(12)}",
                "object": "list",
                "created": int(time.time()),
                "model": body["model"],
                "data": data,
                "usage": _usage(tokens),
            }
        )

    async def _answered(
        self, incoming: Incoming
    ) -> tuple[dict[str, Any], list[list[float]], int, Version | None]:
        """A body's fields, what came of each of its texts, their tokens in all, and who answered
        them.
        """
        caller = caller_of(incoming)
        async with self.intake.body(incoming) as raw:
            body = _understood(body_of(raw))
            adapter = self.names.adapter(caller, body["model"])
            given = _texts(body["input"])
            texts = await asyncio.to_thread(self.encoder.encoding.tokens_of, given)
        caller.begin(len(texts))
        found: list[Future[list[float]]] = []
        try:
            version, found = self.encoder.submit(adapter, texts)
            rows = await asyncio.gather(*map(_waited, found))
        finally:
            caller.end(len(texts))
            for each in found:
                each.cancel()
        return body, list(rows), sum(map(len, texts)), version


async def _waited(found: Future[list[float]]) -> list[float]:
    return await asyncio.wrap_future(found)


def _understood(body: dict[str, Any]) -> dict[str, Any]:
    """The body, if all of it can be followed. Errors: `RequestRefused` that names every fault."""
    faults = [f"{name} is not known" for name in body if name not in _KNOWN]
    faults += [f"{name} is missing" for name in ("model", "input") if name not in body]
    if not isinstance(body.get("model", ""), str):
        faults.append("model must be a string")
    if body.get("encoding_format", "float") not in ("float", "base64"):
        faults.append("encoding_format must be float or base64")
    if "dimensions" in body:
        faults.append("dimensions is not supported: vectors are given whole")
    if faults:
        raise RequestRefused("the body cannot be followed", faults=faults)
    return body


def _texts(given: Any) -> list[str | list[int]]:
    """The texts: a string, tokens, or a list of either. Errors: `RequestRefused`."""
    several = given if isinstance(given, list) and not _tokens(given) else [given]
    if not all(isinstance(each, str) or _tokens(each) for each in several):
        raise RequestRefused(
            "input cannot be read", expected="a string, a list of tokens, or a list of either"
        )
    if not 1 <= len(several) <= MOST_TEXTS:
        raise RequestRefused(
            "input has too many texts, or none",
            found=str(len(several)),
            expected=f"1 to {MOST_TEXTS}",
        )
    try:
        for each in several:
            if isinstance(each, str):
                each.encode()
    except UnicodeEncodeError as error:  # half of a pair of surrogates, which JSON can say
        raise RequestRefused("a text is not Unicode", found=ascii(error.object)[:200]) from error
    return several


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities of logits; of one alone, as a sigmoid."""
    if len(logits) == 1:
        return [1 / (1 + math.exp(-logits[0]))]
    most = max(logits)
    parts = [math.exp(each - most) for each in logits]
    return [part / sum(parts) for part in parts]


def _packed(row: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()


def _usage(tokens: int) -> Mapping[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}
