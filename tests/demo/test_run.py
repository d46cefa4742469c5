"""The demo from end to end on the real embedded base, with tasks cut to a few rows and steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sidepath.base import embedded_base
from sidepath.demo import run as demo
from sidepath.demo.tasks import Task, make_tasks


def short_tasks(seed: int = 0) -> list[Task]:
    """The demo's tasks with 48 training rows, 3 test rows and 3 steps."""
    return [
        dataclasses.replace(task, steps=3, train=task.train[:48], test=task.test[:3])
        for task in make_tasks(seed=seed)
    ]


@contextmanager
def silent(what: str) -> Iterator[Callable[..., None]]:
    yield lambda *_: None


def test_the_demo_proves_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(demo, "make_tasks", short_tasks)
    said: list[str] = []
    result = demo.run_demo(tmp_path / "out", seed=1, progress=silent, say=said.append)
    json.dumps(result)
    assert [task["name"] for task in result["tasks"]] == ["restaurant", "sql", "sentiment"]
    for task in result["tasks"]:
        assert 0 < task["lora_trainable"] <= 0.04 * task["full_trainable"]
        assert len(task["lora_losses"]) == len(task["full_losses"]) == 3
        folder = tmp_path / "out" / "adapters" / task["name"]
        assert (folder / "adapter_model.safetensors").stat().st_size == task["lora_bytes"]
        assert task["lora_bytes"] == pytest.approx(result["plan"]["adapter_bytes"], rel=0.01)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged" / task["name"])
        assert not [name for name in merged.state_dict() if "sidepath" in name]
    assert result["routed_equal"] is True
    assert result["parity"]["top1"] == 1.0
    assert Path(result["report"]).read_text().startswith("<!doctype html>")
    assert any("audit: 48 rows" in text for text in said)
    again = demo.run_demo(tmp_path / "out", seed=1, progress=silent, say=said.append)
    assert again["report"] == result["report"], "a second demo replaces the first one's files"


def test_the_embedded_base_is_untouched_by_its_own_demo() -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded_base(), dtype=torch.float32)
    stored = load_file(embedded_base() / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
    size = sum(path.stat().st_size for path in embedded_base().iterdir() if path.is_file())
    assert size <= 12 * 2**20
