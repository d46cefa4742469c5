"""The peer: PEFT, if it is installed, with the same factors in the same places as ours."""

from __future__ import annotations

import importlib.util
import sys
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.errors import ParityError
from sidepath.injection.surgery import activate
from sidepath.methods.lora import LoRA
from sidepath.methods.lowrank import LowRank
from sidepath.store.adapter import inject

PEER_MISSING = "PEFT is not installed, so its columns are empty: pip install 'sidepath[bench]'"
RANK, ALPHA = 8, 16.0


def has_peft() -> bool:
    """Whether the peer is installed."""
    if "peft" in sys.modules:
        return sys.modules["peft"] is not None
    return importlib.util.find_spec("peft") is not None


def with_ours(
    model: nn.Module, names: Sequence[str] = ("ours",), *, as_base: bool = False
) -> nn.Module:
    """Adapters of ours on a model, r=8 on all linear layers, with factors drawn by name. In place.

    `as_base`: factors in the base's dtype; else in float32, the default of ours and of PEFT.
    """
    config = LoRA(r=RANK, alpha=ALPHA, dtype="base" if as_base else "float32")
    for name in names:
        for path, delta in inject(model, config, name).deltas.items():
            assert isinstance(delta, LowRank)
            draw_((delta.A, delta.B), f"{name} {path}")
    activate(model, names[0])
    return model


@torch.no_grad()
def draw_(factors: Iterable[Tensor], key: str) -> None:
    """Values as training leaves them, `B` no longer zero; the same for the same key. In place."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    for factor in factors:
        factor.copy_(torch.randn(factor.shape, generator=generator) * 0.02)


def with_peft(
    model: nn.Module, names: Sequence[str] = ("ours",), *, as_base: bool = False
) -> nn.Module:
    """PEFT's adapters of the same places, factors and dtype on a fresh model; the first is active.

    PEFT must be installed (`has_peft`). The model is wrapped, as PEFT does.
    """
    with warnings.catch_warnings():
        # PEFT asks transformers under a deprecated name, and bitsandbytes for a kernel on import.
        warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing`|Failed to load CPU")
        made = _peft_model(model, names, as_base)
    modules = dict(made.base_model.model.named_modules())
    for name in names:
        for path, module in modules.items():
            if "lora_A" in module._modules and name in module.lora_A:
                factors = (module.lora_A[name].weight, module.lora_B[name].weight)
                draw_(factors, f"{name} {path}")
    result: nn.Module = made
    return result


def _peft_model(model: Any, names: Sequence[str], as_base: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=_has_conv1d(model),
    )
    first, *others = names
    options = {"autocast_adapter_dtype": not as_base}
    made: Any = get_peft_model(model, config, adapter_name=first, **options)  # type: ignore[arg-type]
    for name in others:
        made.add_adapter(name, config, **options)
    return made


def _has_conv1d(model: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def require_agreement(found: Mapping[str, Tensor], tolerance: float) -> None:
    """Raise `ParityError` unless ours and the peer's results agree: else nothing was compared.

    The difference is relative to the largest value of ours; other ways are not looked at.
    """
    ours, peer = found.get("ours"), found.get("PEFT")
    if ours is None or peer is None:
        return
    apart = (ours.double() - peer.double()).abs().max() / ours.double().abs().max()
    if not float(apart) <= tolerance:
        raise ParityError(
            "ours and PEFT compute different things, so their times say nothing",
            found=f"results {float(apart):.1e} apart",
            expected=f"at most {tolerance:.0e}",
        )
