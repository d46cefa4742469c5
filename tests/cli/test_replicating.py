"""`serve --replicas` where it cannot serve: one message, exit code 2, and nothing started."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.conftest import tiny_bert

from .conftest import Run


@pytest.fixture
def encoder(tiny_base: Path, tmp_path: Path) -> Path:
    tiny_bert().save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def refused(run: Run, *flags: object) -> str:
    ran = run("serve", "--port", "0", *flags)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    return ran.err


def test_what_replicas_have_no_form_of(run: Run, tiny_base: Path, encoder: Path) -> None:
    both = refused(run, "--base", encoder, "--merge", "one", "--replicas", 2)
    assert "--merge one: one adapter is merged in one process" in both
    assert f"{encoder} is an encoder: replicas serve language models" in both
    vllm = refused(run, "--base", tiny_base, "--engine", "vllm", "--replicas", 2)
    assert "found: --replicas" in vllm
    assert "replicas" in refused(run, "--base", tiny_base, "--replicas", 0)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_it_names_what_installs_it(run: Run, tiny_base: Path) -> None:
    said = refused(run, "--base", tiny_base, "--replicas", 2)
    assert "pip install 'sidepath[serve,scale]'" in said
    assert "ray" not in sys.modules


def test_more_replicas_than_gpus(
    run: Run, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "at most 1, or --device cpu" in refused(run, "--base", tiny_base, "--replicas", 2)


def test_help_says_what_ray_listens_on(run: Run) -> None:
    said = " ".join(run("serve", "--help").out.split())
    assert "Ray's own ports on ALL its interfaces" in said
