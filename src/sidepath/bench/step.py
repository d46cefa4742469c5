"""A training step: ours and PEFT's over the floor, and full fine-tuning's.

The floor is the same frozen base with nothing but the activations' gradients computed, because
its embeddings' output requires them: what any method that trains beside the whole base has to pay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.bench.figure import OURS, PEER, Figure, Targets, figure_of
from sidepath.bench.models import DType, Shape, batch_of, make, token_ids
from sidepath.bench.peers import has_peft, require_agreement, with_ours, with_peft
from sidepath.bench.setting import Bench
from sidepath.config import TrainConfig
from sidepath.training.loss import batch_loss
from sidepath.training.optim import make_optimizer

FLOOR, FULL = "floor", "full"
TOLERANCES: Mapping[DType, float] = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far two losses may be apart, relatively."""
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Step:
    """One training step, forward and backward, of a batch in which every token is supervised."""

    shape: Shape
    dtype: DType
    rows: int
    tokens: int
    targets: Targets = field(default_factory=dict)
    as_base: bool = False
    """Factors in the base's dtype; else in float32, the default of ours and of PEFT."""
    optimizer: bool = False
    """Whether each way (but the floor, which trains nothing) moves its parameters as well."""
    full: bool = True
    """Whether full fine-tuning is measured: the base's bytes once more, and its gradients'."""

    def __call__(self, name: str, bench: Bench) -> Figure:
        losses, models = losses_of(self, bench)
        require_agreement(
            {way: loss().detach() for way, loss in losses.items()}, TOLERANCES[self.dtype]
        )
        actions = {
            way: step_of(models[way], loss, self.optimizer and way != FLOOR, fused=way != OURS)
            for way, loss in losses.items()
        }
        samples, peaks = bench.timed(actions, warmup=1)
        notes = ["each way's parameters are moved by AdamW"] if self.optimizer else []
        return figure_of(
            name,
            self.described(bench),
            samples,
            self.targets,
            reference=FLOOR,
            notes=notes,
            peak_bytes=peaks,
        )

    def described(self, bench: Bench) -> str:
        """What is measured, in one line."""
        adapters = self.dtype if self.as_base else "float32"
        optimizer = " and AdamW" if self.optimizer else ""
        return (
            f"training step{optimizer}, {self.shape} {self.dtype}, "
            f"{bench.rows(self.rows)} x {bench.tokens(self.tokens)} tokens, "
            f"LoRA r=8 in {adapters} on all linear layers"
        )


def losses_of(step: Step, bench: Bench) -> tuple[dict[str, Loss], dict[str, nn.Module]]:
    """Each way's loss as its users compute it, and its model: floor, ours, PEFT, full.

    Ours takes a `Batch` to `batch_loss`; the others hand labels to the model, as transformers'
    Trainer does, with the same attention mask and without a cache.
    """

    def fresh() -> nn.Module:
        return make(step.shape, step.dtype, bench.device, quick=bench.quick)

    floor: Any = fresh()
    floor.get_input_embeddings().register_forward_hook(_require_gradients)
    models: dict[str, nn.Module] = {FLOOR: floor, OURS: with_ours(fresh(), as_base=step.as_base)}
    if has_peft():
        models[PEER] = with_peft(fresh(), as_base=step.as_base).train()
    if step.full:
        models[FULL] = fresh().requires_grad_(True)
    ids_BT = token_ids(floor, bench.rows(step.rows), bench.tokens(step.tokens))
    losses = {way: labelled_loss(model, ids_BT) for way, model in models.items()}
    losses[OURS] = our_loss(models[OURS], ids_BT)
    return losses, models


def our_loss(model: nn.Module, ids_BT: Tensor) -> Loss:
    """The mean loss of a batch, as our training loop computes it."""
    batch = batch_of(ids_BT)
    return lambda: batch_loss(model, batch) / batch.weight


def labelled_loss(model: nn.Module, ids_BT: Tensor) -> Loss:
    """The mean loss of the same batch, as transformers' Trainer has it computed."""
    mask_BT = torch.ones_like(ids_BT)

    def loss() -> Tensor:
        found: Tensor = model(
            input_ids=ids_BT, attention_mask=mask_BT, labels=ids_BT, use_cache=False
        ).loss
        return found

    return loss


def step_of(model: nn.Module, loss: Loss, optimizer: bool, *, fused: bool) -> Callable[[], None]:
    """One step: forward, backward, the optimiser if asked for, and the gradients dropped.

    AdamW is our loop's for ours; `fused`: torch's fused one, the Trainer's default.
    """
    trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
    moves: torch.optim.Optimizer | None = None
    if optimizer and fused:
        moves = torch.optim.AdamW(trained.values(), lr=1e-5, fused=True)
    elif optimizer:
        moves = make_optimizer(trained, TrainConfig(learning_rate=1e-5))

    def run() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        if moves is not None:
            moves.step()
        model.zero_grad(set_to_none=True)

    return run


def _require_gradients(module: nn.Module, args: object, output: Tensor) -> None:
    """A hook: the embeddings' output requires gradients, so that activations get theirs."""
    if torch.is_grad_enabled():
        output.requires_grad_(True)
