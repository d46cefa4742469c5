"""The memory of a training step, before there is one: a twin without memory takes the step.

The twin's tensors are torch's fake ones: they have shapes, dtypes and the device CPU, so that
torch chooses the kernels it would choose on the real tensors (attention without the T x T
matrix, dropout's masks), and no memory. What the twin's step holds is counted storage by storage.

Dimensions: B rows, T tokens, V vocabulary, N targets, C classes.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sidepath.core.adapted import CHILD
from sidepath.errors import SidepathError
from sidepath.injection.head import frozen_body, fused_head
from sidepath.injection.registry import registry_of
from sidepath.injection.surgery import activate, put_in, remove, use_kernels
from sidepath.methods.base import Method, Site
from sidepath.store.live import LiveBytes, held_tensors, quantisation_tensors, storage_bytes
from sidepath.store.stacks import FEW, Counted, equal_blocks, extended

_UNRUNNABLE = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    NotImplementedError,
    SidepathError,
)
"""What a forward pass raises that is not one of token ids, that reads values, or that an adapter
refuses: gradient checkpointing without a cache, adapters to compose that are not on the twin."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of one training step (one forward and backward pass, then AdamW).

    `total` is the peak. Activations are None for models that a forward pass of token ids alone
    does not run; `total` is then what the known parts hold.
    """

    weights: int
    """The base (packed where it is quantised), its buffers, and every adapter on it."""
    gradients: int
    """All gradients; over several forward passes a step they are there at each one's peak."""
    optimizer: int
    """AdamW's two moments."""
    activations: int | None
    """The rest of the peak: what the backward pass needs, logits, temporaries."""
    activations_plain: int | None = None
    """The same without gradient checkpointing."""
    activations_checkpointed: int | None = None
    """The same with it; None where the model has none."""
    kept: int | None = None
    """Of the activations: what is alive between the forward and the backward pass."""

    @property
    def total(self) -> int:
        """The peak: the sum of the known parts."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)

    def as_dict(self) -> dict[str, int | None]:
        """The `memory` of the JSON document of `sidepath plan`."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "total": self.total,
            "activations_plain": self.activations_plain,
            "activations_checkpointed": self.activations_checkpointed,
            "kept": self.kept,
        }


@dataclass(frozen=True)
class Shape:
    """The batch of the predicted step."""

    batch_size: int
    tokens: int
    supervised: float = 1.0
    """Share of each row, at its end, whose tokens are targets."""
    padded: bool = True
    """Rows of several lengths: attention then needs a mask. Full rows hold a little less."""
    autocast: bool = False
    """The forward pass runs under autocast to bfloat16."""
    logits: int | None = None
    """Positions of each row, at its end, that get logits; those of the targets when not given."""
    packed: bool = False
    """Several examples in a row, told apart by their positions."""
    fused: bool = True
    """With fused kernels, where there are such."""


class Twin:
    """A copy of a model in shapes alone, with one fresh adapter on it and active."""

    def __init__(
        self,
        model: nn.Module,
        config: Method,
        sites: list[Site],
        cut: tuple[str, int] | None = None,
    ) -> None:
        """`cut`: the path of the list of blocks, and how many of them the twin has."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.held = storage_bytes(held_tensors(model))
        """Bytes that the model itself holds."""
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            self.model = weightless(model)
            if cut is not None:
                sites = _cut(self.model, sites, *cut)
            with torch.random.fork_rng(devices=[]):
                self.installed = put_in(self.model, config, "plan", sites)
            activate(self.model, "plan")
        settings: Any = getattr(self.model, "config", None)
        if getattr(settings, "use_cache", False):
            settings.use_cache = False  # nothing is generated; transformers would say so
        self.trained = storage_bytes(self.installed.parameters())
        """Bytes of the adapter's parameters."""
        kept = (buffer for d in self.installed.deltas.values() for buffer in d.buffers())
        self.frozen = storage_bytes(kept)
        """Bytes of what the adapter holds and does not train."""
        self._stack = None if cut else equal_blocks(model, sites, self.installed.deltas)
        self._made_of = (model, config, sites)

    @cached_property
    def _few(self) -> list[Twin]:
        """Twins of fewer blocks, which tell what this one holds: see `sidepath.store.stacks`."""
        if self._stack is None:
            return []
        return [Twin(*self._made_of, (self._stack[0], blocks)) for blocks in FEW]

    def memory(self, shape: Shape, *, checkpointing: bool, activations: bool = True) -> Memory:
        """The memory of one step on a batch of this shape; `activations` may be left unknown."""
        plain = self._told(shape) if activations else None
        checkpointed = None
        if plain is not None and getattr(self.model, "supports_gradient_checkpointing", False):
            for twin in (self, *self._few):
                switch_checkpointing(twin.model, on=True)
            checkpointed = self._told(shape)
            for twin in (self, *self._few):
                switch_checkpointing(twin.model, on=False)
        most, kept = (checkpointed if checkpointing else plain) or (None, None)
        return Memory(
            weights=self.held + self.trained + self.frozen,
            gradients=self.trained,
            optimizer=2 * self.trained,
            activations=most,
            activations_plain=plain[0] if plain else None,
            activations_checkpointed=checkpointed[0] if checkpointed else None,
            kept=kept,
        )

    def _told(self, shape: Shape) -> tuple[int, int] | None:
        """`_activations`, told from twins of fewer blocks where that comes to the same."""
        counts: list[Counted] = []
        for blocks, twin in zip(FEW, self._few, strict=False):
            found = twin._activations(shape)
            if found is None:
                return None
            counts.append(Counted(blocks, *found, twin.trained))
        told = None if self._stack is None else extended(counts, self._stack[1])
        return told or self._activations(shape)

    def _activations(self, shape: Shape) -> tuple[int, int] | None:
        """Bytes of the peak beyond weights, gradients and optimizer; those kept for backward.

        None where a forward pass of token ids does not run on the model.
        """
        self.model.train().zero_grad(set_to_none=True)
        if (body := frozen_body(self.model, self.installed.deltas)) is not None:
            body.eval()  # as in training, see `training/features.py`
        use_kernels(self.model, "fused" if shape.fused else "plain")
        held = list(held_tensors(self.model))
        try:
            with self._mode, warnings.catch_warnings(), LiveBytes(held) as count:
                warnings.simplefilter("ignore")  # the real step will say it
                before = count.live
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=shape.autocast):
                    loss = _loss(self.model, shape)
                kept = count.live - before
                loss.backward()  # type: ignore[no-untyped-call]
        except _UNRUNNABLE:
            return None
        return max(count.peak - before - self.trained, 0), kept


def _loss(model: nn.Module, shape: Shape) -> Tensor:
    """The loss of a batch, step for step as training computes it (`training/loss.py`)."""
    ids_BT = torch.zeros(shape.batch_size, shape.tokens, dtype=torch.long)
    mask_BT = torch.ones_like(ids_BT) if shape.padded else None
    head = fused_head(model)
    called = model if head is None else head.body
    known = inspect.signature(type(called).forward).parameters
    targets = min(max(1, math.ceil(shape.supervised * shape.tokens)), shape.tokens - 1)
    kept = min(max(targets, shape.logits or 0), shape.tokens - 1)
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    if head is None and "logits_to_keep" in known:
        options["logits_to_keep"] = kept + 1
    if shape.packed:
        options["position_ids"], mask_BT = torch.zeros_like(ids_BT), None
    count = shape.batch_size * targets
    # Any index of N places does: a mask's size would have to be read from its values.
    rows_N = torch.zeros(count, dtype=torch.long)
    if head is not None:
        hidden_BTD = head.hidden(input_ids=ids_BT, attention_mask=mask_BT, **options)
        return head.loss(hidden_BTD[:, -kept - 1 : -1][rows_N, rows_N], rows_N) / count
    logits = model(input_ids=ids_BT, attention_mask=mask_BT, **options).logits
    if logits.dim() == 3:
        logits = logits[:, -kept - 1 : -1][rows_N, rows_N]
    else:
        count, rows_N = shape.batch_size, rows_N[: shape.batch_size]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return functional.cross_entropy(logits, rows_N, reduction="sum") / count


def _cut(model: nn.Module, sites: list[Site], path: str, count: int) -> list[Site]:
    """Leave only the first blocks of a list of them, in place, and the sites that still are."""
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    del blocks[count:]
    left = tuple(f"{path}.{number}." for number in range(count))
    return [s for s in sites if not s.path.startswith(f"{path}.") or s.path.startswith(left)]


def weightless(model: nn.Module) -> nn.Module:
    """A deep copy of the model without its adapters, with empty tensors of the same shapes.

    To be called under `FakeTensorMode`, where empty tensors cost nothing.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _empty_parameter(parameter, memo)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = _empty(buffer)
    twin = copy.deepcopy(model, memo)
    registry = registry_of(twin)
    for name in list(registry.adapters) if registry is not None else ():
        remove(twin, name)
    assert not any(CHILD in path.split(".") for path, _ in twin.named_modules())
    return twin


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _empty_parameter(parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    empty = nn.Parameter(_empty(parameter), parameter.requires_grad)
    state = getattr(parameter, "quant_state", None)
    if state is not None:  # bitsandbytes' layers ask their weight for its scales
        for tensor in quantisation_tensors(state):
            memo[id(tensor)] = _empty(tensor)
        empty.quant_state = copy.deepcopy(state, memo)  # type: ignore[attr-defined]
    return empty


def switch_checkpointing(model: Any, *, on: bool) -> None:
    """Recompute activations or stop doing so; transformers renamed the methods within 5.x."""
    kind = "activation" if "activation_checkpointing_enable" in dir(type(model)) else "gradient"
    if on:
        # The re-entrant form needs an input that requires a gradient; a frozen base gives none.
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()
