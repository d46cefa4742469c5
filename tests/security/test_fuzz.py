"""Schemathesis against the server's own document: what it sends, and what it sends amiss."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from sidepath.serve.openapi import document
from tests.security.conftest import Server

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


@schema.parametrize()
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_the_document_says(case: Any, server: Server) -> None:
    headers = {"Authorization": f"Bearer {server.operator}"}
    reply = case.call(base_url=f"http://127.0.0.1:{server.port}", headers=headers)
    case.validate_response(reply, checks=CHECKS)
