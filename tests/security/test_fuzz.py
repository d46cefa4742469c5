"""Schemathesis against the server's own document: what it sends, and what it sends amiss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from sidepath.serve.encoder_http import application
from sidepath.serve.encoder_openapi import encoder_document
from sidepath.serve.encoders import Encoder
from sidepath.serve.openapi import document
from sidepath.serve.pooling import Pooling
from tests.conftest import tiny_bert
from tests.security.conftest import Server
from tests.serve.kit import Letters, tiny_encoder
from tests.serve.sockets import served

schemathesis: Any = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
schema = schemathesis.openapi.from_dict(document())
of_vectors = schemathesis.openapi.from_dict(encoder_document(pooled=True))
of_classes = schemathesis.openapi.from_dict(encoder_document(pooled=False))
few = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def encoders() -> Iterator[dict[bool, str]]:
    """The addresses of an encoder that gives vectors, and of one that gives classes."""
    with ExitStack() as stack:
        found = {}
        for pooled in (True, False):
            model, pooling = (tiny_encoder(), Pooling()) if pooled else (tiny_bert(), None)
            encoder = stack.enter_context(Encoder(model, Letters(), pooling))
            port = stack.enter_context(served(application(encoder, "base")))
            found[pooled] = f"http://127.0.0.1:{port}"
        yield found


@of_vectors.parametrize()
@few
def test_what_the_document_of_vectors_says(case: Any, encoders: dict[bool, str]) -> None:
    case.validate_response(case.call(base_url=encoders[True]), checks=CHECKS)


@of_classes.parametrize()
@few
def test_what_the_document_of_classes_says(case: Any, encoders: dict[bool, str]) -> None:
    case.validate_response(case.call(base_url=encoders[False]), checks=CHECKS)


@schema.parametrize()
@few
def test_what_the_document_says(case: Any, server: Server) -> None:
    headers = {"Authorization": f"Bearer {server.operator}"}
    reply = case.call(base_url=f"http://127.0.0.1:{server.port}", headers=headers)
    case.validate_response(reply, checks=CHECKS)
