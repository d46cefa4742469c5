"""Tensors of a base that its model has no place for: they go into the merged folder as they lie.

Old checkpoints store buffers that are computed now (`rotary_emb.inv_freq`), others a head for
several tokens at once that transformers does not run; both are passed over in silence while a model
is loaded (floor 5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sidepath.errors import StoreError
from sidepath.merging.mapped import Place
from sidepath.merging.names import names_on_disk
from sidepath.merging.writing import DTYPES, Entry
from sidepath.store.fingerprint import checkpoint_files, renamed
from sidepath.store.peft_format import base_state
from sidepath.store.stored import stored_name
from sidepath.store.tensors import TensorInfo, read_header

_PASSED_OVER = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""What transformers passes over in every model, beside what a model's class names itself."""
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


def leftovers(model: Any, unread: Iterable[str], base: Path) -> list[Entry]:
    """The tensors of the base's files that no tensor of its model is made of, to be copied.

    `unread`: those that transformers says it had no use for. What it has put together with others,
    or unpacked, is none of them.

    Errors: `StoreError` for one of a type that cannot be written again.
    """
    known, passed_over = _names_of(model), _passed_over(model)
    said = {one for name in unread for one in (name, _shorter(name))}
    found: list[Entry] = []
    faults = []
    for path, name, info in _stored(base):
        own = renamed(name)
        unused = bool({own, _shorter(own)} & said) or passed_over.search(own) is not None
        if not unused or stored_name(own, known) is not None:
            continue
        if info.dtype in _TORCH:
            place = Place(path, info.start)
            found.append(Entry(name, _TORCH[info.dtype], info.shape, _lies_in_its_file, place))
        else:
            faults.append(f"{name}: {info.dtype}")
    if faults:
        raise StoreError(
            "the base holds tensors that its model has no place for, of types that are not copied",
            where=base,
            faults=faults,
        )
    return found


def told(entries: Iterable[Entry]) -> Mapping[str, Any]:
    """What was carried over, for people and for records."""
    entries = list(entries)
    return {
        "tensors": len(entries),
        "bytes": sum(entry.size for entry in entries),
        "names": [entry.name for entry in entries],
    }


def _names_of(model: Any) -> dict[str, str]:
    """Every name that a tensor of the model may have in a folder."""
    state = base_state(model)
    on_disk = names_on_disk(model, state) or {}
    return dict.fromkeys([*state, *on_disk.values()], "")


def _passed_over(model: Any) -> re.Pattern[str]:
    own = model._keys_to_ignore_on_load_unexpected or ()
    return re.compile("|".join(f"({pattern})" for pattern in (*_PASSED_OVER, *sorted(own))))


def _shorter(name: str) -> str:
    """A name without its first part, which a model with another head has more or less of."""
    return name.partition(".")[2] or name


def _stored(base: Path) -> Iterator[tuple[Path, str, TensorInfo]]:
    for path in checkpoint_files(base):
        for name, info in read_header(path, floating_only=False).items():
            yield path, name, info


def _lies_in_its_file() -> Tensor:
    raise AssertionError("such a tensor is copied from its file, and never made")
