"""How an encoder's last states become one vector, as sentence-transformers' folders say (floor 5).

`modules.json` lists a transformer, a pooling and perhaps a normalisation, with a folder each; a
base without it is pooled by the mean of its tokens, as sentence-transformers itself does.

Dimensions: B rows, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sidepath.errors import StoreError
from sidepath.store.tensors import read_json

MODULES = "modules.json"
SETTINGS = "sentence_bert_config.json"


def _first(states_BTD: Tensor, mask_BT1: Tensor) -> Tensor:
    at_B = mask_BT1.squeeze(2).argmax(dim=1)
    return states_BTD[torch.arange(len(states_BTD)), at_B]


def _last(states_BTD: Tensor, mask_BT1: Tensor) -> Tensor:
    positions_T = torch.arange(mask_BT1.shape[1], device=mask_BT1.device)
    at_B = (mask_BT1.squeeze(2) * positions_T).argmax(dim=1)
    return states_BTD[torch.arange(len(states_BTD)), at_B]


def _most(states_BTD: Tensor, mask_BT1: Tensor) -> Tensor:
    return states_BTD.masked_fill(mask_BT1 == 0, -torch.inf).amax(dim=1)


def _mean(states_BTD: Tensor, mask_BT1: Tensor) -> Tensor:
    return (states_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)


def _root(states_BTD: Tensor, mask_BT1: Tensor) -> Tensor:
    return (states_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1).sqrt()


WAYS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pooling_mode_cls_token": _first,
    "pooling_mode_max_tokens": _most,
    "pooling_mode_mean_tokens": _mean,
    "pooling_mode_mean_sqrt_len_tokens": _root,
    "pooling_mode_lasttoken": _last,
}
"""By the names of sentence-transformers; of several the vectors stand one after another."""


@dataclass(frozen=True)
class Pooling:
    """One vector a row."""

    ways: tuple[str, ...] = ("pooling_mode_mean_tokens",)
    normalised: bool = False
    most_tokens: int | None = None
    """Longest text in tokens; None: what the base's positions reach."""

    def of(self, states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """The vectors (B, D x ways) of last states whose padding is 0 in the mask, in float32."""
        states_BTD, mask_BT1 = states_BTD.float(), mask_BT[:, :, None].float()
        pooled = torch.cat([WAYS[way](states_BTD, mask_BT1) for way in self.ways], dim=1)
        return F.normalize(pooled, dim=1) if self.normalised else pooled


def pooling_of(folder: Path) -> Pooling:
    """What a base's folder says of how it is pooled.

    Errors: one `StoreError` that names everything it asks for and that is not done here.
    """
    most = _settings(folder / SETTINGS).get("max_seq_length")
    if not (folder / MODULES).is_file():
        return Pooling(most_tokens=most if isinstance(most, int) else None)
    modules = _read(folder / MODULES)
    kinds = [str(each.get("type", "")).rpartition(".")[2] for each in modules]
    faults = [
        f"{MODULES}: a {kind} cannot be followed"
        for kind in kinds
        if kind not in ("Transformer", "Pooling", "Normalize")
    ]
    ways: list[str] = []
    for module, kind in zip(modules, kinds, strict=True):
        if kind == "Pooling":
            settings = _settings(folder / str(module.get("path", "")) / "config.json")
            asked = [name for name in settings if name.startswith("pooling_mode_")]
            asked = [name for name in asked if settings[name]]
            faults += [f"{name} cannot be followed" for name in asked if name not in WAYS]
            ways += [name for name in WAYS if name in asked]
    if not ways:
        faults.append(f"{MODULES}: no pooling is named")
    if faults:
        raise StoreError("the base cannot be pooled as it says", where=folder, faults=faults)
    return Pooling(tuple(ways), "Normalize" in kinds, most if isinstance(most, int) else None)


def _settings(path: Path) -> dict[str, Any]:
    found = _read(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise StoreError("not JSON", where=path, found=error) from error
