"""Training on a GPU: the CPU's losses, resumed bits, 4-bit bases, paged state, memory, NCCL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sidepath
from sidepath import LoRA, TrainConfig
from sidepath.data.dataset import load_data
from sidepath.injection.quantising import dequantise_, quantise_
from sidepath.injection.registry import require_registry
from sidepath.kernels.dropout import Mask
from sidepath.training.loop import train
from tests.cli.conftest import Run
from tests.tokens import byte_tokenizer, pairs_of_many_lengths
from tests.training.kit import llama, with_lora
from tests.training.test_checkpoint import run as piece
from tests.training.test_checkpoint import same_bits

WORKSPACE = 128 * 2**20
"""Bytes that libraries may keep beside a step's own."""


def test_a_run_has_the_losses_it_has_on_the_cpu(
    run: Run, base_flags: list[str], tmp_path: Path
) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        ran = run(*base_flags, "--output", tmp_path / device, "--device", device)
        assert ran.code == 0, ran.err
        found[device] = ran.document["loss"]
    assert found["cuda"]["first"] == pytest.approx(found["cpu"]["first"], rel=1e-5)
    # Where A starts is drawn by the device's own generator: the runs part from there.
    assert found["cuda"]["last"] == pytest.approx(found["cpu"]["last"], rel=0.03)


@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_a_resumed_run_has_the_unbroken_runs_bits(
    gpu: torch.device, tmp_path: Path, stop: int
) -> None:
    """What the CPU promises; on a GPU seen for these operators, not promised for every one."""
    data = load_data(pairs_of_many_lengths(), byte_tokenizer())

    def fresh() -> Any:
        return with_lora(llama(), dropout=0.2, r=3).to(gpu)

    whole, model = fresh(), fresh()
    expected = piece(whole, data, tmp_path / "whole")
    piece(fresh(), data, tmp_path / "broken", stop=stop)
    torch.manual_seed(999)
    torch.cuda.manual_seed(999)
    after = piece(model, data, tmp_path / "broken", resume=True)
    assert [report.loss for report in after] == [report.loss for report in expected[stop:]]
    assert same_bits(model, whole)


@pytest.mark.parametrize("more", [[], ["--dtype", "bfloat16"], ["--packing", "--max-tokens", "64"]])
def test_memory_is_what_was_predicted_and_the_librarys_workspace(
    run: Run, base_flags: list[str], tmp_path: Path, more: list[str]
) -> None:
    """CuBLAS keeps a workspace, 64 MiB where this was seen: more than all of so tiny a step."""
    ran = run(*base_flags, "--output", tmp_path / "out", "--device", "cuda", *more)
    assert ran.code == 0, ran.err
    memory = ran.document["memory"]
    assert memory["predicted"] <= memory["measured"] <= memory["predicted"] + WORKSPACE


def test_a_4_bit_base_learns(run: Run, base_flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    flags = [*base_flags, "--output", tmp_path / "out", "--device", "cuda", "--quantise", "nf4"]
    ran = run(*flags, "--steps", "30")
    assert ran.code == 0, ran.err
    loss = ran.document["loss"]
    assert loss["last"] < loss["first"]


def test_paged_state_moves_the_adapter_about_as_adamw_does(
    gpu: torch.device, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    data = load_data(pairs_of_many_lengths(), byte_tokenizer())
    found = {}
    for optimizer in ("adamw", "paged_adamw_8bit"):
        model = with_lora(llama(), r=3).to(gpu)
        config = TrainConfig(steps=30, learning_rate=2e-2, optimizer=optimizer)  # type: ignore[arg-type]
        found[optimizer] = [report.loss for report in train(model, data, config)]
    assert found["adamw"][0] == pytest.approx(found["paged_adamw_8bit"][0])
    for losses in found.values():
        assert losses[-1] < losses[0] - 0.1
    assert found["paged_adamw_8bit"][-1] == pytest.approx(found["adamw"][-1], rel=0.05)


def test_a_4_bit_layers_gradients_are_its_unpacked_layers(gpu: torch.device) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(3)
    model = llama().to(gpu)
    quantise_(model, dtype=torch.float32)
    packed = with_lora(model, r=3)
    plain = with_lora(llama(), r=3).to(gpu)
    bare = llama().to(gpu)
    quantise_(bare, dtype=torch.float32)
    dequantise_(bare)
    for path, module in bare.named_modules():
        if isinstance(module, torch.nn.Linear):
            plain.get_submodule(path).weight.data.copy_(module.weight.data)
    ids_BT = torch.randint(3, 258, (2, 9), device=gpu)
    grads = []
    for each in (packed, plain):
        for parameter in require_registry(each).adapter("a").parameters():
            torch.manual_seed(parameter.numel())
            parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
        each(input_ids=ids_BT, labels=ids_BT).loss.backward()
        grads.append([own.grad for own in require_registry(each).adapter("a").parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_one_process_of_nccl_trains_as_none_does(
    run: Run, base_flags: list[str], tmp_path: Path
) -> None:
    alone = run(*base_flags, "--output", tmp_path / "alone", "--device", "cuda")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    for way in ("ddp", "fsdp"):
        flags = [*base_flags, "--output", tmp_path / way, "--device", "cuda", "--distributed", way]
        command = [*launcher, "-m", "sidepath", "--", *map(str, flags)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ}, timeout=240
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout[done.stdout.index("{") :])
        assert found["loss"]["last"] == pytest.approx(alone.document["loss"]["last"], rel=1e-4)


def test_dropout_draws_the_same_mask_again(gpu: torch.device) -> None:
    x = torch.ones(64, 64, device=gpu)
    mask = Mask.drawn(0.25)
    assert torch.equal(mask.on(x), mask.on(x))
    assert 0.6 < float((mask.on(x) > 0).float().mean()) < 0.9


def test_a_merge_in_memory_is_undone_to_the_bit(gpu: torch.device) -> None:
    model = llama().to(gpu).bfloat16()
    adapter = sidepath.inject(model, LoRA(r=4), name="a")
    for parameter in adapter.parameters():
        parameter.data.normal_(std=0.1)
    before = {name: own.clone() for name, own in model.state_dict().items()}
    sidepath.merge(model, "a")
    sidepath.unmerge(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], own) for name, own in before.items())
