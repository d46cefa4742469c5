"""The engine on a GPU: each answer is its own adapter's; kernels and their verdicts."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import sidepath
from sidepath import LoRA
from sidepath.errors import KernelNotice
from sidepath.injection.quantising import quantise_
from sidepath.injection.registry import require_registry
from sidepath.kernels.checked import TRIALS, Verdict
from sidepath.serve.requests import Request
from tests.conftest import randomise
from tests.serve.kit import BASES
from tests.serve.test_engine import Setting


def name_of(adapter: int | None) -> str | None:
    return None if adapter is None else f"adapter-{adapter}"


@pytest.mark.parametrize("base", list(BASES))
def test_every_answer_is_its_own_adapters(gpu: torch.device, tmp_path: Path, base: str) -> None:
    setting = Setting(lambda: BASES[base]().to(gpu), tmp_path)
    setting.alone.model.to(gpu)
    engine, rng = setting.engine(), random.Random(4)
    asked = []
    for _ in range(12):
        adapter = rng.choice([None, 0, 1, 2, 3])
        request = Request(setting.prompt(rng), name_of(adapter), rng.randint(1, 10))
        asked.append((engine.submit(request), adapter))
        engine.step()
    while engine.step():
        pass
    for handle, adapter in asked:
        request = handle.request
        expected = tokens_alone(setting, adapter, request.prompt, request.max_new_tokens, gpu)
        assert handle.result().tokens == expected
    assert engine.load == (0, 0, 0)


def tokens_alone(
    setting: Setting, adapter: int | None, prompt: Any, new: int, gpu: torch.device
) -> tuple[int, ...]:
    """What `generate` gives on the GPU."""
    model = setting.alone.model
    sidepath.activate(model, name_of(adapter))
    ids = torch.tensor([prompt], device=gpu)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    return tuple(out[0, len(prompt) :].tolist())


def llama_256(dtype: torch.dtype, gpu: torch.device) -> Any:
    """Wide enough for the kernels' tiles."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    return LlamaForCausalLM(config).to(device=gpu, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_routed_rows_go_through_a_kernel_that_agreed(gpu: torch.device, dtype: torch.dtype) -> None:
    TRIALS.verdicts.clear()
    TRIALS.barred.clear()
    model = llama_256(dtype, gpu)
    for number, rank in enumerate((4, 8, 16, 3)):
        sidepath.inject(model, LoRA(r=rank), name=f"a{number}")
        randomise(require_registry(model).adapter(f"a{number}").parameters(), std=0.05)
    names = ["a2", None, "a0", "a1", "a3", "a0", None, "a2"]
    ids_BT = torch.randint(0, 512, (len(names), 7), device=gpu)
    with warnings.catch_warnings(), torch.no_grad(), sidepath.route(model, names):
        warnings.simplefilter("error", KernelNotice)
        first, then = (model(input_ids=ids_BT).logits for _ in range(2))
    assert not TRIALS.barred
    assert Verdict.FAST in TRIALS.verdicts.values()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    scale = float(first.float().abs().max())
    assert float((first - then).float().abs().max()) <= tolerance * scale
    for row, name in enumerate(names):
        sidepath.activate(model, name)
        with torch.no_grad():
            own = model(input_ids=ids_BT[row : row + 1]).logits[0]
        assert float((own - then[row]).float().abs().max()) <= tolerance * scale


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_4_bit_base_answers_through_the_kernel_or_the_plain_path_alike(
    gpu: torch.device, rows: int
) -> None:
    pytest.importorskip("bitsandbytes")
    TRIALS.verdicts.clear()
    TRIALS.barred.clear()
    model = llama_256(torch.bfloat16, gpu)
    quantise_(model)
    sidepath.inject(model, LoRA(r=8), name="a")
    randomise(require_registry(model).adapter("a").parameters(), std=0.05)
    sidepath.activate(model, "a")
    ids_BT = torch.randint(0, 512, (rows, 1), device=gpu)
    with torch.no_grad():
        first, then = (model(input_ids=ids_BT).logits.float() for _ in range(2))
    assert not TRIALS.barred, TRIALS.barred
    assert float((first - then).abs().max()) <= 6e-2 * float(first.abs().max())
