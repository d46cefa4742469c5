"""EVA's start: the inputs' principal directions, and ranks where they explain most."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sidepath.errors import ConfigError, UnsupportedModule
from sidepath.injection.registry import registry_of
from sidepath.methods.lora import LoRA
from sidepath.methods.lowrank import LowRank
from sidepath.store.adapter import load
from sidepath.store.eva import Directions, inject_eva, spread_ranks
from tests.conftest import outputs, tiny_gpt2, tiny_llama


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(3):
        ids_BT = torch.randint(3, 64, (4, 9), generator=generator)
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[0, 5:] = 0
        found.append({"input_ids": ids_BT, "attention_mask": mask_BT})
    return found


def inputs_at(model: nn.Module, path: str) -> Tensor:
    """Every unpadded input row of a layer, by a hook of the test's own."""
    rows: list[Tensor] = []
    layer = model.get_submodule(path)
    handle = layer.register_forward_hook(lambda m, args, y: rows.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches()]
    return torch.cat([x[mask] for x, mask in zip(rows, masks, strict=True)])


def test_directions_found_in_pieces_are_those_of_all_rows() -> None:
    x = torch.randn(60, 8, dtype=torch.float64) * torch.linspace(3, 0.5, 8)
    pieces = Directions(8)
    for piece in x.split(7):
        pieces.add(piece)
    _, S, V = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close((pieces.first(3) @ V[:3].T).abs(), torch.eye(3).double())
    explained = torch.tensor(pieces.explained(), dtype=torch.float64)
    torch.testing.assert_close(explained, S.square() / S.square().sum())
    assert pieces.seen == 60


def test_ranks_go_where_they_explain_most() -> None:
    explained = {"a": [0.5, 0.4, 0.05], "b": [0.3, 0.3, 0.3], "c": [0.01, 0.0, 0.0]}
    assert spread_ranks(explained, 4) == {"a": 2, "b": 2, "c": 0}
    assert spread_ranks(explained, 6) == {"a": 3, "b": 3, "c": 0}
    assert spread_ranks(explained, 99) == {"a": 3, "b": 3, "c": 1}, "nothing explains nothing"


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_a_starts_at_the_inputs_and_nothing_else_changes(scaling: str, tmp_path: Path) -> None:
    model, ids = tiny_llama().train(), torch.randint(3, 64, (2, 7))
    base = outputs(model, ids)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = LoRA(r=3, alpha=6, scaling=scaling)  # type: ignore[arg-type]
    adapter = inject_eva(model, config, batches(), "a", rho=2)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(outputs(model, ids), base)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    ranks = {path: delta.A.shape[0] for path, delta in adapter.deltas.items()
             if isinstance(delta, LowRank)}  # fmt: skip
    assert sum(ranks.values()) == 3 * 14
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 6
    plain = tiny_llama()
    for path, delta in adapter.deltas.items():
        assert isinstance(delta, LowRank)
        A, r = delta.A.detach(), ranks[path]
        torch.testing.assert_close(A @ A.T, torch.eye(r), atol=1e-5, rtol=0)
        assert delta.scaling == pytest.approx(config.scaling_of(path))
        x = inputs_at(plain, path)
        _, S, _ = torch.linalg.svd(x, full_matrices=False)
        # Cut to six directions a batch, so nearly, not exactly, the best there are.
        kept = (x @ A.T).square().sum()
        assert kept <= S[:r].square().sum() * (1 + 1e-5)
        assert kept >= 0.97 * S[:r].square().sum()
    again = tiny_llama()
    load(again, adapter.save(tmp_path / "a"), "b")
    assert torch.equal(outputs(again, ids), base)


def test_one_batch_gives_exactly_its_principal_directions() -> None:
    model = tiny_llama()
    batch = {"input_ids": batches()[0]["input_ids"]}
    rows: list[Tensor] = []
    layer = model.get_submodule("model.layers.1.self_attn.v_proj")
    handle = layer.register_forward_hook(lambda m, args, y: rows.append(args[0].flatten(0, 1)))
    outputs(model, batch["input_ids"])
    handle.remove()
    adapter = inject_eva(model, LoRA(r=3, targets=("v_proj",)), [batch], "a", rho=1)
    delta = adapter.deltas["model.layers.1.self_attn.v_proj"]
    assert isinstance(delta, LowRank)
    assert delta.A.shape == (3, 32), "rho 1 is r everywhere"
    _, _, V = torch.linalg.svd(rows[0], full_matrices=False)
    torch.testing.assert_close((delta.A @ V[:3].T).abs().detach(), torch.eye(3), atol=1e-4, rtol=0)


def test_what_it_refuses() -> None:
    model = tiny_gpt2()
    with pytest.raises(ConfigError) as caught:
        inject_eva(model, LoRA(start="pissa", rank_pattern={"c_fc": 3}), [], rho=0.5)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "rho", "rank_pattern", "start",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="at least 16 rows"):
        inject_eva(model, LoRA(targets=("c_fc",)), [])
    with pytest.raises(UnsupportedModule, match="wte"):
        inject_eva(model, LoRA(targets=("wte", "c_fc")), batches())
    assert registry_of(model) is None
    inject_eva(model, LoRA(r=2, targets=("c_attn:q,v",)), batches())
