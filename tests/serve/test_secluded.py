"""What Ray is told before it is imported."""

from __future__ import annotations

import os

import pytest

from sidepath.errors import ServeError
from sidepath.serve.secluded import refuse_open, secluded


def test_each_run_has_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    tokens = set()
    for _ in range(2):
        with pytest.raises(ServeError):
            refuse_open()
        with secluded():
            refuse_open()
            assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
            tokens.add(os.environ["RAY_AUTH_TOKEN"])
    assert {len(token) for token in tokens} == {64}
    assert len(tokens) == 2
    assert os.environ["RAY_AUTH_MODE"] == "disabled", "what was there is there again"
    assert "RAY_AUTH_TOKEN" not in os.environ
