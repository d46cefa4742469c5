"""A model stored in half precision that computes in float32, without all of it being so (floor 5).

Its repeated blocks get their weights in float32 when they are called, and give them back after
that; what lies outside of them (embeddings, the last norm, the head) is in float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from sidepath.injection.architecture import modules_of
from sidepath.merging.folded import to_float32
from sidepath.merging.mapped import Mapped

KEPT = 2**29
"""Bytes of blocks that stay in float32 between calls: small models are made so once."""

Alter = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Given the names of tensors that are in float32 now: those that others shall stand in place of."""


class _Own(NamedTuple):
    """One tensor of the base, and where its module keeps it."""

    name: str
    table: dict[str, Any]
    local: str
    tensor: Tensor

    def put(self, tensor: Tensor) -> None:
        """Let another tensor stand here."""
        parameter = isinstance(self.tensor, nn.Parameter)
        self.table[self.local] = nn.Parameter(tensor, False) if parameter else tensor

    def restore(self) -> None:
        """Let the base's own stand here again."""
        self.table[self.local] = self.tensor


class _Part:
    """Tensors that are in float32 together: those of a block, or all that lie outside of any."""

    def __init__(self, owned: Sequence[_Own], mapped: Mapped | None, alter: Alter | None) -> None:
        self._owned, self._mapped, self._alter = owned, mapped, alter
        self.bytes = 0
        """What is held in float32 beside the base's own tensors."""
        self.wide = False

    def widen(self) -> None:
        """Put float32 in the place of half precision, and what `alter` says in that of others."""
        if self.wide:
            return
        self.wide, self.bytes = True, 0
        made: dict[int, Tensor] = {}
        for own in self._owned:
            exact = made.setdefault(id(own.tensor), to_float32(own.tensor.detach()))
            self._put(own, exact)
        if self._alter is not None:
            others = self._alter([own.name for own in self._owned])
            for own in self._owned:
                if own.name in others:
                    self._put(own, others[own.name])

    def _put(self, own: _Own, tensor: Tensor) -> None:
        if tensor.data_ptr() != own.tensor.data_ptr():
            self.bytes += tensor.nbytes
            own.put(tensor)
            self._release(own)

    def narrow(self) -> None:
        """Put the base's own tensors back, and let their pages go."""
        self.wide, self.bytes = False, 0
        for own in self._owned:
            own.restore()
            self._release(own)

    def _release(self, own: _Own) -> None:
        if self._mapped is not None:
            self._mapped.release(own.tensor)


@contextmanager
def in_float32(
    model: nn.Module, mapped: Mapped | None = None, alter: Alter | None = None
) -> Iterator[None]:
    """Within the block a model computes in float32, whatever its base is stored in.

    Side paths are left as they are: make theirs float32 yourself. `alter` is asked for each group
    of tensors when they are in float32. `mapped` lets pages of files go that are not needed now.
    Afterwards the model holds the tensors that it held.
    """
    parts = {name: _Part(own, mapped, alter) for name, own in _by_block(model).items()}
    held: set[_Part] = set()
    kept = 0

    def before(part: _Part) -> Callable[..., None]:
        return lambda *_: part.widen()

    def after(part: _Part) -> Callable[..., None]:
        def hook(*_: object) -> None:
            nonlocal kept
            counted = part in held
            if not counted and kept + part.bytes <= KEPT:
                kept += part.bytes
                held.add(part)
            elif not counted:
                part.narrow()

        return hook

    with ExitStack() as stack:
        for part in parts.values():
            stack.callback(part.narrow)
        for path, part in parts.items():
            if path is None:
                part.widen()
                continue
            block = model.get_submodule(path)
            stack.callback(block.register_forward_pre_hook(before(part)).remove)
            stack.callback(block.register_forward_hook(after(part)).remove)
        yield


def _by_block(model: nn.Module) -> dict[str | None, list[_Own]]:
    """The base's tensors by the block they lie in; None: outside of any."""
    modules = {"": model, **dict(modules_of(model))}
    found: dict[str | None, list[_Own]] = {None: []}
    for path, module in modules.items():
        own = found.setdefault(_block(path, modules), [])
        for table in (module._parameters, module._buffers):
            own += [
                _Own(f"{path}.{local}" if path else local, table, local, tensor)
                for local, tensor in table.items()
                if tensor is not None
            ]
    return {path: own for path, own in found.items() if own}


def _block(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The outermost numbered module around a path that is called itself (lists are not)."""
    words = path.split(".")
    for number, word in enumerate(words, start=1):
        outer = ".".join(words[:number])
        if word.isdigit() and type(modules[outer]).forward is not nn.Module.forward:
            return outer
    return None
