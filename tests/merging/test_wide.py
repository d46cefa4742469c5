"""A half-precision model computes in float32, block by block, and is itself again afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidepath.merging import wide
from sidepath.merging.folded import to_float32
from sidepath.merging.wide import in_float32
from tests.conftest import outputs, tiny_bert, tiny_gpt2, tiny_llama

IDS = torch.tensor([[5, 9, 3, 17, 22], [1, 2, 3, 4, 5]])


@pytest.mark.parametrize("kept", [0, 2**29])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tied=True), tiny_gpt2, tiny_bert])
def test_the_outputs_are_those_of_the_whole_model_in_float32(
    make: Any, dtype: torch.dtype, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "KEPT", kept)
    model = make().to(dtype)
    before = {name: (id(held), held.clone()) for name, held in model.named_parameters()}
    with in_float32(model):
        found = [outputs(model, IDS) for _ in range(2)]
    after = {name: (id(held), held) for name, held in model.named_parameters()}
    assert {name: key for name, (key, _) in before.items()} == {
        name: key for name, (key, _) in after.items()
    }
    assert all(torch.equal(before[name][1], held) for name, (_, held) in after.items())
    expected = outputs(model.float(), IDS)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


def test_only_as_many_blocks_are_wide_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llama(layers=4).bfloat16()
    layers = model.model.layers
    size = sum(2 * p.nbytes for p in layers[0].parameters())

    def wide_blocks() -> list[int]:
        return [n for n, layer in enumerate(layers) if layer.mlp.up_proj.weight.itemsize == 4]

    seen: list[list[int]] = []
    hook = layers[3].self_attn.register_forward_hook(lambda *_: seen.append(wide_blocks()))
    for room in (0, size, 2 * size, 9 * size):
        monkeypatch.setattr(wide, "KEPT", room)
        with in_float32(model):
            assert model.lm_head.weight.dtype == torch.float32
            outputs(model, IDS)
    hook.remove()
    assert seen == [[3], [0, 3], [0, 1, 3], [0, 1, 2, 3]]
    assert wide_blocks() == []


def test_an_error_within_leaves_the_model_as_it_was() -> None:
    model: Any = tiny_llama().bfloat16()
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    held = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(IndexError), in_float32(model):
        outputs(model, IDS + 1000)
    assert [id(parameter) for parameter in model.parameters()] == held
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_others_stand_in_where_they_are_wanted() -> None:
    """`alter` sees its names in float32, and what it gives is computed with."""
    model: Any = tiny_llama().bfloat16()
    name = "model.layers.1.mlp.up_proj.weight"
    seen: list[torch.dtype] = []

    def doubled(names: Sequence[str]) -> Mapping[str, Tensor]:
        seen.extend(model.get_parameter(one).dtype for one in names if one.endswith("weight"))
        return {one: 2 * model.get_parameter(one).detach() for one in names if one == name}

    with in_float32(model, alter=doubled):
        found = outputs(model, IDS)
    assert set(seen) == {torch.float32}
    model.float()
    model.get_parameter(name).data *= 2
    assert torch.equal(found, outputs(model, IDS))


def test_float32_is_never_copied() -> None:
    weight = nn.Parameter(torch.randn(3))
    assert to_float32(weight.detach()).data_ptr() == weight.data_ptr()
    assert to_float32(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert to_float32(torch.ones(2, dtype=torch.int8)).dtype == torch.int8
