"""A training step: what each way trains, and what the floor computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sidepath.bench import step as module
from sidepath.bench.peers import draw_, has_peft, require_agreement, with_peft
from sidepath.bench.setting import Bench
from sidepath.bench.step import FLOOR, FULL, Step, losses_of, step_of
from sidepath.errors import ParityError

STEP = Step("llama", "float32", 3, 8)
needs_peft = pytest.mark.skipif(not has_peft(), reason="PEFT is not installed")


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [own for own in model.parameters() if own.requires_grad]


@needs_peft
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("as_base", [False, True])
def test_ours_and_the_peer_train_the_same_tensors_to_the_same_loss(
    shape: Any, dtype: Any, as_base: bool, quick: Bench
) -> None:
    losses, models = losses_of(Step(shape, dtype, 3, 8, as_base=as_base), quick)
    shapes = {
        way: sorted((tuple(own.shape), str(own.dtype)) for own in trained(models[way]))
        for way in ("ours", "PEFT")
    }
    assert shapes["ours"] == shapes["PEFT"]
    assert len(shapes["ours"]) == 2 * (14 if shape == "llama" else 8)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(losses["ours"](), losses["PEFT"](), rtol=tolerance, atol=0)
    assert losses["ours"]().item() != losses[FLOOR]().item(), "the adapter says something"


@needs_peft
def test_ours_and_the_peer_have_the_same_gradients(quick: Bench) -> None:
    losses, models = losses_of(STEP, quick)
    norms = {}
    for way in ("ours", "PEFT"):
        losses[way]().backward()  # type: ignore[no-untyped-call]
        found = [own.grad for own in trained(models[way]) if own.grad is not None]
        norms[way] = sorted(float(gradient.norm()) for gradient in found)
    assert norms["ours"] == pytest.approx(norms["PEFT"], rel=1e-4)


def test_the_floor_computes_the_activations_gradients_and_no_weights(quick: Bench) -> None:
    """Its backward pass reaches the embeddings' output, and leaves no gradient behind."""
    losses, models = losses_of(STEP, quick)
    outputs: list[torch.Tensor] = []
    model: Any = models[FLOOR]

    def keep(_module: object, _args: object, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    model.get_input_embeddings().register_forward_hook(keep)
    losses[FLOOR]().backward()  # type: ignore[no-untyped-call]
    gradient = outputs[0].grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0
    assert all(own.grad is None for own in model.parameters())
    assert not trained(model)
    assert len(trained(models[FULL])) == len(list(models[FULL].parameters()))


@pytest.mark.parametrize("way", ["ours", FULL])
@pytest.mark.parametrize("optimizer", [False, True])
def test_a_step_moves_what_is_trained_only_with_an_optimiser(
    way: str, optimizer: bool, quick: Bench
) -> None:
    losses, models = losses_of(STEP, quick)
    before = [own.detach().clone() for own in models[way].parameters()]
    step_of(models[way], losses[way], optimizer, fused=way != "ours")()
    moved = [
        not torch.equal(own, old) for own, old in zip(models[way].parameters(), before, strict=True)
    ]
    wanted = [optimizer and own.requires_grad for own in models[way].parameters()]
    assert moved == wanted
    assert all(own.grad is None for own in models[way].parameters())


@pytest.mark.usefixtures("without_peft")
def test_without_the_peer_the_others_are_measured(quick: Bench) -> None:
    found = STEP("x", quick)
    assert set(found.ways) == {FLOOR, "ours", FULL}
    assert found.ratio is None
    assert [one.of for one in found.comparisons] == ["ours / floor"]


@needs_peft
def test_ways_that_do_not_agree_are_not_timed(
    quick: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer is given other factors: its loss is another one, and the figure is refused."""

    def other(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        made: torch.nn.Module = with_peft(model, **options)
        draw_([own for own in made.parameters() if own.requires_grad], "other")
        with torch.no_grad():
            for own in trained(made):
                own.mul_(40)
        return made

    monkeypatch.setattr(module, "with_peft", other)
    with pytest.raises(ParityError, match="compute different things"):
        STEP("x", quick)


def test_agreement_is_relative_and_nan_agrees_with_nothing() -> None:
    ours = torch.tensor([100.0, 1.0])
    require_agreement({"ours": ours, "PEFT": ours + 0.5, "floor": ours * 9}, 1e-2)
    require_agreement({"ours": ours}, 0.0)
    for wrong in (ours + 2, ours * float("nan")):
        with pytest.raises(ParityError):
            require_agreement({"ours": ours, "PEFT": wrong}, 1e-2)
