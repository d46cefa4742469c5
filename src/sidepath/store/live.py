"""How many bytes of tensors are alive, and the most there were: counted by storage, op by op.

The same count runs over real tensors (a measurement) and over shapes without memory (a
prediction): what an operator leaves behind counts from its return to its last reference's end.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_DEQUANTISES = "bitsandbytes::gemm_4bit"
"""An operator that unpacks its whole weight inside itself, where no count sees it."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block, the bytes of every tensor that operators make, each storage once.

    Tensors that exist already count only where they are handed over as `held`. Temporary
    buffers inside an operator's own kernel are not seen. The block's operators are slower by
    some microseconds each; their results are untouched.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Bytes alive now."""
        self.peak = 0
        """Most bytes that were alive at once."""
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        if func.name() == _DEQUANTISES:
            # The weight, and the copy in the activations' dtype where that is another one.
            self.peak = max(self.peak, self.live + math.prod(args[2]) * args[0].element_size())
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage is None or storage._cdata in self._known:
            return
        key, size = storage._cdata, storage.nbytes()
        self._known[key] = weakref.ref(storage, self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: object) -> None:
            del self._known[key]
            self.live -= size

        return forget


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors; shared ones count once."""
    storages = (_storage(tensor) for tensor in tensors)
    return sum({s._cdata: s.nbytes() for s in storages if s is not None}.values())


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Everything a model holds: parameters, buffers, and the scales of quantised weights.

    bitsandbytes keeps the scales beside a packed weight in its `quant_state`, which is neither
    a parameter nor a buffer.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        yield from quantisation_tensors(getattr(tensor, "quant_state", None))


def quantisation_tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of a bitsandbytes `QuantState`, those of its nested one included."""
    if state is None:
        return
    for value in vars(state).values():
        if isinstance(value, Tensor):
            yield value
        elif type(value) is type(state):
            yield from quantisation_tensors(value)


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage, or None for layouts that have none of their own (sparse)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
