"""PEFT's names and shapes for the tensors of an adapter (floor 4; the only place that knows them).

Dimensions: O out, I in, R rank, N parts of a fused projection, G groups of a convolution.

PEFT knows one form only, `B A` of the whole matrix. A delta of N parts of a fused projection
is that form at rank N R: A is stacked already, and B (O, N R) is zero outside its blocks. A
grouped convolution in PEFT has an A that reads all channels; ours, which looks at each group's
channels alike, is that form at rank G R, with A repeated along a block diagonal. Both are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidepath.core.adapted import CHILD
from sidepath.core.delta import Delta
from sidepath.core.views import DenseView, view_of
from sidepath.errors import DamagedAdapter, StoreError, nearest
from sidepath.methods.base import Site
from sidepath.methods.dora import why_not
from sidepath.methods.lora import LoRA
from sidepath.methods.lowrank import LowRank
from sidepath.store.tensors import TensorInfo

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_FACTORS = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
_EMBEDDING_FACTORS = {"A": ".lora_embedding_A", "B": ".lora_embedding_B"}
BASE_BIAS = ".base_layer.bias"
MAGNITUDE = ".lora_magnitude_vector"
TOKENS = ".token_adapter.trainable_tokens_delta"
FACTORS_A = (_FACTORS["A"], _EMBEDDING_FACTORS["A"])
"""Endings of the tensors whose first dimension is the rank."""
ENDINGS = (*_FACTORS.values(), *_EMBEDDING_FACTORS.values(), BASE_BIAS, MAGNITUDE)
PAIRS = (tuple(_FACTORS.values()), tuple(_EMBEDDING_FACTORS.values()))
"""A's and B's endings: of linear layers and convolutions, of embeddings."""
LEFT_BY_PEFT = ("original_module.", "modules_to_save.")
"""Of modules inside one that is trained whole PEFT saves the base's copies too, named so."""


@dataclass(frozen=True)
class Slot:
    """One tensor of the file, and the delta's tensor it holds."""

    key: str
    path: str
    local: str
    shape: tuple[int, ...]


def slots_of(
    modules: Mapping[str, nn.Module], config: LoRA, sites: Iterable[Site]
) -> tuple[list[Slot], list[str]]:
    """The tensors that an adapter of these sites has in PEFT's form, and the sites' faults."""
    slots: list[Slot] = []
    faults: list[str] = []
    tables: set[nn.Parameter] = set()
    for site in sites:
        module = modules.get(site.path)
        if module is None:
            faults.append(absent(site.path, modules))
            continue
        if site.kind == "tokens" and (table := module._parameters.get("weight")) is not None:
            if table in tables:  # its rows are in the file once
                continue
            tables.add(table)
        try:
            slots += _slots_at(module, config, site)
        except ValueError as error:
            faults.append(f"{site.path}: {error}")
    return slots, faults


def absent(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The fault of a site whose module is not there, with the nearest that are."""
    close = nearest(path, modules)
    return f"{path}: the base has no such module" + (f"; the nearest are {close}" if close else "")


def _slots_at(module: nn.Module, config: LoRA, site: Site) -> Iterator[Slot]:
    start = PREFIX + site.path
    if site.kind == "whole":
        for local, tensor in base_state(module).items():
            yield Slot(f"{start}.{local}", site.path, local, tuple(tensor.shape))
    elif site.kind == "bias":
        yield Slot(f"{start}.bias", site.path, "bias", tuple(_bias(module).shape))
    elif site.kind == "tokens":
        yield Slot(start + TOKENS, site.path, "rows", (len(config.token_rows), _width(module)))
    else:
        view = view_of(module)
        if view is None:
            raise ValueError(f"{type(module).__name__} holds no matrix to adapt")
        _check_parts(site.parts, view.shape[0])
        if config.dora and (reason := why_not(view, site)):
            raise ValueError(reason)
        shapes = disk_shapes(view, config.rank_of(site.path), len(site.parts) or 1)
        names = _EMBEDDING_FACTORS if view.kind == "embedding" else _FACTORS
        for local, ending in names.items():
            yield Slot(start + ending, site.path, local, shapes[local])
        if config.dora:
            yield Slot(start + MAGNITUDE, site.path, "magnitude", view.shape[:1])
        if config.bias != "none" and view.bias is not None:
            yield Slot(start + BASE_BIAS, site.path, "bias", tuple(view.bias.shape))


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors without those that side paths brought."""
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if CHILD not in name.split(".")}


def _bias(module: nn.Module) -> Tensor:
    bias = module._parameters.get("bias")
    if bias is None:
        raise ValueError("the module has no bias to train")
    return bias


def _width(module: nn.Module) -> int:
    """The features of each row of an embedding or a head."""
    view = view_of(module)
    if view is None or view.kind not in ("linear", "embedding"):
        raise ValueError(f"{type(module).__name__} holds no rows of tokens")
    return view.weight.shape[1]


def _check_parts(parts: Sequence[tuple[int, int]], rows: int) -> None:
    at = 0
    for start, stop in parts:
        if not at <= start < stop <= rows:
            raise ValueError(f"parts {list(parts)} do not lie in order within {rows} rows")
        at = stop


def groups_of(view: DenseView) -> int:
    """The groups of a convolution; 1 for every other layer."""
    return int(view.module.groups) if view.kind == "conv" else 1  # type: ignore[arg-type]


def disk_shapes(view: DenseView, rank: int, parts: int) -> dict[str, tuple[int, ...]]:
    """PEFT's shapes of `A` and `B` for a layer, at rank `rank` of each part or group."""
    rows, columns = view.shape
    if view.kind != "conv":
        return {"A": (parts * rank, columns), "B": (rows, parts * rank)}
    groups, kernel = groups_of(view), view.weight.shape[2:]
    channels = view.weight.shape[1] * groups
    return {
        "A": (groups * rank, channels, *kernel),
        "B": (rows, rank, *(1 for _ in kernel)),
    }


def to_disk(delta: Delta, view: DenseView | None) -> dict[str, Tensor]:
    """A delta's tensors in PEFT's shapes, by local name; detached, on the CPU, contiguous."""
    tensors = {name: tensor.detach() for name, tensor in delta.tensors().items()}
    if isinstance(delta, LowRank) and view is not None:
        A, B = in_peft_shapes(tensors["A"], tensors["B"], view, delta.parts)
        tensors |= {"A": A, "B": B}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def in_peft_shapes(
    A: Tensor, B: Tensor, view: DenseView, parts: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """A delta's A and B in PEFT's shapes, for the layer they stand beside."""
    if view.kind == "conv":
        A = spread_groups(A.reshape(-1, *view.weight.shape[1:]), groups_of(view))
        B = B.reshape(*B.shape, *(1 for _ in view.weight.shape[2:]))
    elif parts:
        B = spread_parts(B, parts, view.shape[0])
    return A, B


def from_disk(tensors: dict[str, Tensor], site: Site, module: nn.Module) -> dict[str, Tensor]:
    """The inverse of `to_disk`: PEFT's shapes to those of the delta of a site beside `module`.

    Errors: `ValueError` when blocks that must be zero, or equal, are not.
    """
    if site.kind != "dense":
        return tensors
    A, B = tensors["A"], tensors["B"]
    if A.dim() > 2:  # a convolution's
        view = view_of(module)
        assert view is not None
        groups = groups_of(view)
        A_grouped = A[: len(A) // groups, : A.shape[1] // groups]
        if not torch.equal(spread_groups(A_grouped, groups), A):
            raise ValueError(
                "lora_A mixes the groups of a grouped convolution, which no delta of its "
                "weight can do"
            )
        return tensors | {"A": A_grouped.reshape(len(A_grouped), -1), "B": B.reshape(B.shape[:2])}
    if site.parts:
        B_blocks = gather_parts(B, site.parts, B.shape[1] // len(site.parts))
        if not torch.equal(spread_parts(B_blocks, site.parts, len(B)), B):
            raise ValueError("lora_B is not zero outside the adapted parts")
        return tensors | {"B": B_blocks}
    return tensors


def spread_groups(A: Tensor, groups: int) -> Tensor:
    """(R, I / G, kernel) to (G R, I, kernel): the same block for each group, zero elsewhere."""
    rank, channels = A.shape[:2]
    spread = A.new_zeros(groups * rank, groups * channels, *A.shape[2:])
    for group in range(groups):
        rows = slice(group * rank, (group + 1) * rank)
        spread[rows, group * channels : (group + 1) * channels] = A
    return spread


def spread_parts(B: Tensor, parts: Sequence[tuple[int, int]], rows: int) -> Tensor:
    """(sum of the parts' rows, R) to (O, N R): each part's block in its own rows and columns."""
    rank, at = B.shape[1], 0
    spread = B.new_zeros(rows, len(parts) * rank)
    for number, (start, stop) in enumerate(parts):
        columns = slice(number * rank, (number + 1) * rank)
        spread[start:stop, columns] = B[at : at + stop - start]
        at += stop - start
    return spread


def gather_parts(B: Tensor, parts: Sequence[tuple[int, int]], rank: int) -> Tensor:
    """The inverse of `spread_parts`, at `rank` columns a part."""
    blocks = [
        B[start:stop, number * rank : (number + 1) * rank]
        for number, (start, stop) in enumerate(parts)
    ]
    return torch.cat(blocks)


def check_keys(slots: Iterable[Slot], header: Mapping[str, TensorInfo]) -> list[str]:
    """Faults of a file's header against the tensors it must hold, no more and no fewer."""
    expected = {slot.key: slot.shape for slot in slots}
    if expected == {key: info.shape for key, info in header.items()}:
        return []
    faults = [f"{key}: missing" for key in expected if key not in header]
    faults += [f"{key}: unexpected" for key in header if key not in expected]
    return faults + [
        f"{key}: shape {list(header[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in header and header[key].shape != shape
    ]


def pack(
    deltas: Mapping[str, Delta], views: Mapping[str, DenseView | None], slots: Iterable[Slot]
) -> dict[str, Tensor]:
    """Every tensor of an adapter by its key in the file. Errors: `StoreError` for integers."""
    ready = {path: to_disk(delta, views[path]) for path, delta in deltas.items()}
    # Tensors that share storage (a head tied within itself) are written apart.
    packed = {slot.key: ready[slot.path][slot.local].clone() for slot in slots}
    integers = [key for key, tensor in packed.items() if not tensor.is_floating_point()]
    if integers:
        raise StoreError(
            "an adapter holds tensors that are not floating point",
            faults=integers,
            hint="do not train whole a module that keeps integer buffers",
        )
    return packed


def by_place(tensors: Mapping[str, Tensor], slots: Iterable[Slot]) -> dict[str, dict[str, Tensor]]:
    """A file's tensors, as they are, by module path and name within the delta."""
    found: dict[str, dict[str, Tensor]] = {}
    for slot in slots:
        found.setdefault(slot.path, {})[slot.local] = tensors[slot.key]
    return found


def unpack(
    tensors: Mapping[str, Tensor],
    sites: Iterable[Site],
    modules: Mapping[str, nn.Module],
    slots: Iterable[Slot],
) -> dict[str, dict[str, Tensor]]:
    """A file's tensors by module path and name within the delta. The inverse of `pack`.

    They share the storage of `tensors` where their form is the file's.
    Errors: `DamagedAdapter` with the faults of every delta whose form is not exact.
    """
    by_path = by_place(tensors, slots)
    faults = []
    for site in sites:
        try:
            own = by_path.get(site.path, {})  # rows of a tied table are another place's
            by_path[site.path] = from_disk(own, site, modules[site.path])
        except ValueError as error:
            faults.append(f"{site.path}: {error}")
    if faults:
        raise DamagedAdapter("the adapter cannot be put into this form", faults=faults)
    return by_path
