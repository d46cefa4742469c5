"""A combined adapter as a folder's tensors, settings and manifest (floor 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidepath.combining.ingredients import Ingredient, Place
from sidepath.combining.layers import Layer
from sidepath.combining.skeletons import described
from sidepath.methods.base import Dtype, Site
from sidepath.methods.lora import LoRA, by_path
from sidepath.store.fingerprint import Fingerprint
from sidepath.store.manifest import Manifest
from sidepath.store.peft_config import BIAS, commonest, number
from sidepath.store.peft_format import BASE_BIAS, PREFIX
from sidepath.store.refactored import formed, keys_at, settings_for

DTYPES: Mapping[torch.dtype, Dtype] = {
    torch.float64: "base",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
"""What a LoRA is loaded in, by the type its factors are stored in, widest first."""
_BIASES = ("none", "lora", "all")


@dataclass(frozen=True)
class Result:
    """What is written of a combination."""

    adapters: Sequence[Ingredient]
    layers: Mapping[str, Layer]
    others: Mapping[Place, Tensor]

    @property
    def whole(self) -> list[str]:
        """Modules that are held whole, by path."""
        paths = {path: None for one in self.adapters for path in one.whole}
        held = {path for path, _ in self.others}
        return [path for path in paths if path in held]

    @property
    def bias(self) -> str:
        """Which biases are trained: the most that any adapter does."""
        return max((one.method.bias for one in self.adapters), key=_BIASES.index)

    def sites(self) -> dict[str, Site]:
        """Every place of the result, in the order of the adapters."""
        whole = self.whole
        found: dict[str, Site] = {}
        for path in dict.fromkeys(path for one in self.adapters for path in one.sites):
            if path in self.layers:
                found[path] = Site(path, "dense", pattern=path)
            elif path in whole:
                found[path] = Site(path, "whole", pattern=path)
            elif (path, "bias") in self.others:
                found[path] = Site(path, "bias", pattern="bias")
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The file's, by PEFT's keys."""
        found: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            keys, (A_old, B_old) = self._before(path)
            pair = formed(layer.factors.A_RI, layer.factors.B_Or, A_old, B_old)
            found |= zip(keys, pair, strict=True)
        for (path, local), tensor in self.others.items():
            ending = BASE_BIAS if path in self.layers else f".{local}"
            found[PREFIX + path + ending] = tensor.contiguous()
        return found

    def _before(self, path: str) -> tuple[tuple[str, str], tuple[Tensor, Tensor]]:
        """Keys, A and B that a module has in the first adapter that adapts it."""
        for one in self.adapters:
            keys = keys_at(path, one.tensors)
            if keys is not None:
                return keys, (one.tensors[keys[0]], one.tensors[keys[1]])
        raise AssertionError(path)

    def config(self) -> LoRA:
        """The LoRA whose deltas these are: `alpha/r` is each layer's scaling."""
        ranks = {path: layer.factors.r for path, layer in self.layers.items()}
        alphas = {path: one.factors.scaling * one.factors.r for path, one in self.layers.items()}
        r, alpha = commonest(ranks.values()), commonest(alphas.values())
        stored = {layer.factors.A_RI.dtype for layer in self.layers.values()}
        return LoRA(
            r=r,
            alpha=alpha,
            dropout=self._dropout(),
            targets=tuple(self.layers),
            rank_pattern=by_path(ranks, usual=r),
            alpha_pattern=by_path(alphas, usual=alpha),
            bias=self.bias,  # type: ignore[arg-type]
            train_whole=tuple(self.whole),
            dtype=next(name for dtype, name in DTYPES.items() if dtype in _widest(stored)),
        )

    def _dropout(self) -> float:
        """Of a further training: what all adapters had, if it was one."""
        return _common([one.method.dropout for one in self.adapters]) or 0.0

    def settings(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """PEFT's settings of the file."""
        ranks, alphas = {}, {}
        for path, layer in self.layers.items():
            ranks[path] = len(tensors[self._before(path)[0][0]])
            alphas[path] = number(layer.factors.scaling * ranks[path])
        first = dict(self.adapters[0].settings)
        written = [one.settings.get("target_modules") for one in self.adapters]
        first["target_modules"] = next((one for one in written if isinstance(one, str)), [])
        heads = all(path in self.whole for one in self.adapters for path in one.whole)
        return settings_for(first, ranks, alphas) | {
            "task_type": _common([one.settings.get("task_type") for one in self.adapters])
            if heads
            else None,
            "lora_dropout": self._dropout(),
            "use_dora": False,
            "bias": BIAS[self.bias],
            "init_lora_weights": True,
            "fan_in_fan_out": all(one.settings.get("fan_in_fan_out") for one in self.adapters),
            "modules_to_save": self.whole or None,
        }

    def manifest(self, base: Path | None, record: Mapping[str, Any]) -> Manifest | None:
        """The manifest; None where nothing tells the base's fingerprint."""
        known = [one.manifest for one in self.adapters if one.manifest is not None]
        sites = tuple(self.sites().values())
        if not known:
            if base is None:
                return None
            return described(base, self.config(), sites, record)
        first = known[0]
        samples = {
            name: sample
            for manifest in reversed(known)
            for name, sample in manifest.base.samples.items()
        }
        return Manifest(
            config=self.config(),
            sites=sites,
            base_name=first.base_name,
            base_revision=first.base_revision,
            model_class=first.model_class,
            labels=first.labels,
            base=Fingerprint(samples).without(self.whole),
            tensors={},
            record=record,
        )


def _widest(stored: set[torch.dtype]) -> set[torch.dtype]:
    """float32 for two 16-bit types: neither holds the other."""
    halves = {torch.bfloat16, torch.float16}
    return {torch.float32} if stored == halves else stored


def _common(values: Sequence[Any]) -> Any:
    """The value that all of them are; None if they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def biases_missing(layers: Mapping[str, Layer], others: Mapping[Place, Tensor]) -> list[str]:
    """The adapted modules for which no bias is held."""
    return [path for path in layers if (path, "bias") not in others]
