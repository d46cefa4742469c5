"""Adapters that come and go: each run leaves the model as the next one finds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidepath.bench.models import make
from sidepath.bench.setting import Bench
from sidepath.bench.switching import Held, Load
from sidepath.injection.registry import require_registry


def test_what_is_held(quick: Bench, tmp_path: Path) -> None:
    held = Held(quick, 3, tmp_path / "adapter", peer=False)
    assert held.peft is None
    adapters = require_registry(held.ours).adapters
    assert list(adapters) == held.names == ["adapter-0", "adapter-1", "adapter-2"]
    first, last = (adapters[held.names[at]].parameters() for at in (0, -1))
    assert all(one.equal(other) for one, other in zip(first, last, strict=True))


def test_loading_leaves_no_adapter_behind(
    quick: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sidepath.bench import switching

    models = []

    def fresh(bench: Bench) -> object:
        models.append(make("linears", "float32", bench.device, quick=True).eval())
        return models[-1]

    monkeypatch.setattr(switching, "_fresh", fresh)
    found = Load(2, peer=False)("x", quick)
    assert len(models) == 1
    assert list(require_registry(models[0]).adapters) == ["adapter-0", "adapter-1"]
    assert found.unit == "seconds"
