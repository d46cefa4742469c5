"""Routed batches in whole models, against one row at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidepath.core.quant import require_bitsandbytes
from sidepath.core.routing import Rows
from sidepath.injection.quantising import quantise_
from sidepath.injection.registry import require_registry
from sidepath.injection.surgery import activate, put_in, route
from sidepath.injection.targets import resolve
from sidepath.methods.lora import LoRA
from tests.conftest import outputs, randomise, tiny_gpt2, tiny_llama

NAMES = ["a", None, "b", "c", "a", "c"]
IDS = torch.randint(3, 64, (len(NAMES), 5), generator=torch.Generator().manual_seed(1))
RANKS = {"a": 2, "b": 4, "c": 3}


def put(model: nn.Module, config: LoRA, name: str) -> None:
    installed = put_in(model, config, name, resolve(model, config))
    randomise(installed.parameters())


def with_three(model: nn.Module, **settings: Any) -> nn.Module:
    for name, rank in RANKS.items():
        put(model, LoRA(r=rank, **settings), name)
    return model


def alone(model: nn.Module, row: int, name: str | None) -> Tensor:
    activate(model, name)
    return outputs(model, IDS[row : row + 1])[0]


def assert_rows(
    model: nn.Module, found: Tensor, tolerance: float, names: list[str | None] = NAMES
) -> None:
    for row, name in enumerate(names):
        expected = alone(model, row, name)
        torch.testing.assert_close(found[row], expected, atol=tolerance, rtol=tolerance)


def odd(config: LoRA, make: Callable[[], Any] = tiny_llama) -> Any:
    """Three adapters, the third of its own kind."""
    model = make()
    for name in "ab":
        put(model, LoRA(r=RANKS[name]), name)
    put(model, config, "c")
    return model


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (tiny_llama, LoRA(r=3, targets=("q_proj", "down_proj"))),
        (tiny_llama, LoRA(r=3, targets=("q_proj", "embed_tokens"), train_whole=("lm_head",))),
        (tiny_gpt2, LoRA(r=3, bias="all")),
        (tiny_gpt2, LoRA(r=3, targets=("c_attn:q,v", "mlp"))),
        (tiny_llama, LoRA(r=3, dtype="bfloat16")),
    ],
    ids=["some layers", "embedding and head", "biases", "parts", "another dtype"],
)
def test_what_shares_no_product_is_put_on_beside_what_does(
    make: Callable[[], Any], config: LoRA
) -> None:
    model = odd(config, make)
    tolerance = 5e-2 if config.dtype == "bfloat16" else 1e-5
    with route(model, NAMES):
        found = outputs(model, IDS)
        trained = model(IDS).logits
    assert_rows(model, found, tolerance)
    assert_rows(model, trained.detach(), tolerance)


def test_rows_of_the_base_keep_their_bits_over_every_adapter() -> None:
    model = tiny_gpt2()
    base = outputs(model, IDS)
    with_three(model)
    with route(model, NAMES):
        assert torch.equal(outputs(model, IDS)[1], base[1])
        assert torch.equal(model(IDS).logits[1], base[1])


def test_more_adapters_than_rows_and_rows_of_none() -> None:
    model = tiny_llama()
    base = outputs(model, IDS[:2])
    with_three(model)
    with route(model, [None, None]):
        assert torch.equal(outputs(model, IDS[:2]), base)
    with route(model, ["b", "a"]):
        found = outputs(model, IDS[:2])
    assert_rows(model, found, 1e-5, ["b", "a"])


def test_float32_adapters_over_a_bfloat16_base() -> None:
    """Of more than a few tokens no float32 copy is made: the thin products run in bfloat16."""
    model = with_three(tiny_llama().to(torch.bfloat16))
    wide = copy.deepcopy(model).to(torch.float32)
    sizes: list[int] = []

    class Widened(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and result.dtype == torch.float32:
                sizes.append(args[0].numel())
            return result

    side = require_registry(model).sides["model.layers.0.mlp.up_proj"]
    x = torch.randn(len(NAMES), 11, 32).bfloat16()
    with route(model, NAMES), torch.no_grad(), Widened():  # type: ignore[no-untyped-call]
        side.view.module(x)
    assert not sizes
    for ids in (IDS, IDS.repeat(1, 3)):
        with route(model, NAMES), route(wide, NAMES):
            found, expected = outputs(model, ids), outputs(wide, ids)
        torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_a_packed_base(dtype: torch.dtype) -> None:
    require_bitsandbytes()
    model = tiny_llama().to(dtype)
    quantise_(model, dtype=dtype)
    with_three(model)
    with route(model, NAMES):
        found = outputs(model, IDS)
    assert_rows(model, found, 1e-5 if dtype == torch.float32 else 6e-2)


def test_under_autocast() -> None:
    model = with_three(tiny_llama())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with route(model, NAMES):
            logits = model(IDS).logits
            found = outputs(model, IDS)
        assert_rows(model, found, 6e-2)
    torch.testing.assert_close(logits, found, atol=6e-2, rtol=6e-2)
    logits.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 3 * 2 * 2 * 7
    assert all(grad.dtype == torch.float32 for grad in gradients)


def gradients(model: nn.Module, backward: Callable[[], None]) -> dict[str, Tensor]:
    model.zero_grad()
    backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_gradients_are_those_of_one_row_at_a_time(make: Callable[[], Any]) -> None:
    model = with_three(make().double(), dtype="base")

    def together() -> None:
        with route(model, NAMES):
            model(IDS).logits.square().sum().backward()

    def apart() -> None:
        for row, name in enumerate(NAMES):
            if name is not None:
                activate(model, name)
                model(IDS[row : row + 1]).logits.square().sum().backward()

    expected, found = gradients(model, apart), gradients(model, together)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_a_base_that_looks_at_its_own_output_trains_too() -> None:
    class Squashed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    model = nn.Sequential(Squashed(6, 5), nn.Linear(5, 4))
    for name in ("a", "b"):
        put(model, LoRA(r=2, targets=("*",)), name)
    with route(model, ["a", "b", None]):
        model(torch.randn(3, 6, requires_grad=True)).sum().backward()
    assert all(p.grad is not None for p in require_registry(model).adapters["a"].parameters())


def test_dropout_acts_in_training_and_not_in_evaluation() -> None:
    model = with_three(tiny_llama(), dropout=0.5)
    with route(model, NAMES):
        quiet = outputs(model, IDS)
    assert_rows(model, quiet, 1e-5)
    model.train()
    with route(model, NAMES):
        torch.manual_seed(0)
        one = model(IDS).logits
        torch.manual_seed(1)
        assert not torch.equal(one, model(IDS).logits)


def rows_of(model: nn.Module) -> Rows:
    rows = require_registry(model).routing.rows
    assert rows is not None
    return rows


def test_what_adapters_held_at_first_answers_until_the_block_ends() -> None:
    model = with_three(tiny_llama())
    with route(model, NAMES):
        before = outputs(model, IDS)
        randomise(require_registry(model).adapters["a"].parameters())
        assert torch.equal(outputs(model, IDS), before)
    with route(model, NAMES):
        after = outputs(model, IDS)
    assert not torch.equal(after[0], before[0])
    assert_rows(model, after, 1e-5)


def test_training_keeps_nothing_and_drops_what_was_kept() -> None:
    model = with_three(tiny_llama())
    with route(model, NAMES):
        before = outputs(model, IDS)
        assert len(rows_of(model).layers) == 14
        model(IDS)
        assert not rows_of(model).layers
        randomise(require_registry(model).adapters["a"].parameters())
        assert not torch.equal(outputs(model, IDS)[0], before[0])


@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad])
def test_masks_made_without_gradients_serve_with_them(guard: Callable[[], Any]) -> None:
    model = with_three(tiny_llama())
    with route(model, NAMES):
        with guard():
            model(IDS)
        model(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in require_registry(model).adapters["b"].parameters())


def assert_compiles(model: nn.Module, x: Tensor, backend: str, **settings: Any) -> None:
    """Traced as one graph, for other rows too, and equal to what is not compiled."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for names in (NAMES, ["c", "c", "b", None, None, "b"]):
        with route(model, names), torch.no_grad():
            expected = model(x, **settings)
        with route(model, names), torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(compiled(x, **settings), expected)
    torch._dynamo.reset()


def test_a_model_compiles_without_graph_breaks() -> None:
    model = with_three(tiny_llama(layers=1))
    assert_compiles(model, IDS, "eager", use_cache=False, return_dict=False)


def test_training_compiles_too() -> None:
    model = with_three(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), targets=("*",))
    x = torch.randn(len(NAMES), 3, 8)
    assert_compiles(model, x, "aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def step(module: Any) -> None:
        with route(model, NAMES):
            module(x).square().sum().backward()

    expected = gradients(model, lambda: step(model))
    found = gradients(model, lambda: step(compiled))
    torch._dynamo.reset()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_a_graph_break_in_a_side_path_would_be_found() -> None:
    """The test above can fail: a layer that breaks the graph is refused."""
    model = with_three(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), targets=("*",))
    module = require_registry(model).sides["0"].view.module
    module.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with route(model, NAMES), torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(torch.randn(len(NAMES), 3, 8))
    torch._dynamo.reset()
