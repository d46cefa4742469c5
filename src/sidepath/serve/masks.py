"""What each token of a ragged batch may see, for every kind of attention layer (floor 5).

Rows of one length are left to the model, which makes its own masks. Rows of different lengths need
masks with a position a row, which `transformers` does not make; they are made here of its own
functions of (query position, key position), one for each kind of layer.

Dimensions: B rows, T new tokens of each, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from sidepath.errors import UnsupportedModule

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Row, head, query position and key position -> whether the query sees the key."""
Masks = Tensor | dict[str, Tensor]


def _full(config: Any) -> Sees:
    sees: Sees = causal_mask_function
    return sees


def _sliding(config: Any) -> Sees:
    sees: Sees = sliding_window_causal_mask_function(config.sliding_window)
    return sees


def _chunked(config: Any) -> Sees:
    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        not_padded = torch.zeros_like(row).flatten()
        of_chunk = chunked_causal_mask_function(config.attention_chunk_size, not_padded)
        found: Tensor = of_chunk(row, head, query, key)
        return found

    return sees


KINDS: Mapping[str, Callable[[Any], Sees]] = {
    "full_attention": _full,
    "sliding_attention": _sliding,
    "chunked_attention": _chunked,
}
ATTENTION = ("sdpa", "eager")
"""Implementations that take a mask for each row; the first as yes or no, the second as numbers."""


def kinds_of(config: Any) -> dict[str, Sees]:
    """What a layer's tokens see, by the kind of layer; one kind under "" if all are alike.

    Errors: `UnsupportedModule` for kinds that have no mask (recurrent layers), and for an attention
    implementation that takes none.
    """
    found = vars(config)
    implementation = config._attn_implementation
    if implementation not in ATTENTION:
        raise UnsupportedModule(
            "this attention implementation takes no mask for each row",
            found=implementation,
            expected=" or ".join(ATTENTION),
            hint='load the base with attn_implementation="sdpa"',
        )
    if found.get("layer_types") is not None:
        kinds = sorted(set(config.layer_types))
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise UnsupportedModule(
                "layers of this base cannot be served in rows of their own",
                found=", ".join(unknown),
                expected=", ".join(KINDS),
            )
        return {kind: KINDS[kind](config) for kind in kinds}
    if found.get("sliding_window") is not None:
        return {"": _sliding(config)}
    if found.get("attention_chunk_size") is not None:
        return {"": _chunked(config)}
    return {"": _full(config)}


def ragged_masks(
    kinds: Mapping[str, Sees],
    positions_BT: Tensor,
    longest: int,
    added: torch.dtype | None = None,
) -> Masks:
    """Masks (B, 1, T, L) for new tokens at `positions`, True where one sees; by kind of layer if
    there are several. `added`: as numbers of that dtype to add instead, 0 or the lowest there is.
    """
    device = positions_BT.device
    row = torch.arange(len(positions_BT), device=device)[:, None, None, None]
    query = positions_BT[:, None, :, None]
    key = torch.arange(longest, device=device)[None, None, None, :]
    found: dict[str, Tensor] = {}
    for kind, sees in kinds.items():
        mask = sees(row, torch.zeros_like(row), query, key)
        if added is not None:
            lowest = torch.finfo(added).min
            mask = torch.zeros(mask.shape, dtype=added, device=device).masked_fill_(~mask, lowest)
        found[kind] = mask
    return found.get("", found)
