"""sidepath -> X -> sidepath gives the same bits, for every format X."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from sidepath.convert.formats import FORMATS, convert, format_of
from sidepath.convert.portable import Base
from sidepath.errors import StoreError
from sidepath.store.adapter import load

from .conftest import biased_llama
from .made import KINDS, SPECIAL, made, options, same_adapter

OTHERS = [name for name in FORMATS if name not in ("sidepath", "peft")]
SAYS = {
    "loralib": {"embedding and head", "biases", "every bias"},
    "mlx": {"DoRA", "embedding and head"},
    "gguf": {"embedding and head"},
    "kohya": set(),
    "diffusers": set(),
}
"""Which of the special adapters a format has a place for."""


Adapters = Callable[[str], tuple[Path, nn.Module]]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """The adapter of each kind, made once: its folder, and the adapted model."""
    place = tmp_path_factory.mktemp("adapters")
    return cache(lambda kind: made(biased_llama, place / kind, **{**KINDS, **SPECIAL}[kind]))


def there_and_back(folder: Path, name: str, base: Base, place: Path) -> Path:
    between = place / ("between" if FORMATS[name].folder else "between.file")
    convert(folder, between, name, options=options(base))
    assert format_of(between) == name
    convert(between, place / "back", "sidepath")
    return place / "back"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OTHERS)
def test_bits_come_back(
    name: str, kind: str, llama: Base, adapters: Adapters, tmp_path: Path
) -> None:
    folder, model = adapters(kind)
    back = there_and_back(folder, name, llama, tmp_path)
    same_adapter(folder, back)
    ids = torch.arange(12).reshape(2, 6)
    fresh = biased_llama()
    load(fresh, back, "back")
    model.eval()
    assert torch.equal(model(ids).logits, fresh(ids).logits)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", OTHERS)
def test_what_a_format_cannot_say_is_refused_by_name(
    name: str, kind: str, llama: Base, adapters: Adapters, tmp_path: Path
) -> None:
    folder, _ = adapters(kind)
    if kind in SAYS[name]:
        same_adapter(folder, there_and_back(folder, name, llama, tmp_path))
        return
    with pytest.raises(StoreError) as raised:
        there_and_back(folder, name, llama, tmp_path)
    faults = " ".join(raised.value.faults)
    word = {
        "DoRA": "q_proj: DoRA's magnitude",
        "embedding and head": "embed_tokens: the update of an embedding",
        "biases": "o_proj.base_layer.bias",
        "every bias": "v_proj.bias",
        "trained whole": "lm_head.weight",
    }[kind]
    assert word in faults
    assert list(tmp_path.iterdir()) == [], "nothing was written"


@pytest.mark.parametrize("kind", [*KINDS, *SPECIAL])
def test_through_peft_with_the_base(
    kind: str, llama: Base, adapters: Adapters, tmp_path: Path
) -> None:
    """PEFT's own folder has no manifest: the base gives a new one, with all that PEFT says."""
    folder, model = adapters(kind)
    convert(folder, tmp_path / "peft", "peft")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    found = convert(tmp_path / "peft", tmp_path / "back", "sidepath", options=options(llama))
    assert found.notes == ()
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "back" / weights).read_bytes()
    ids = torch.arange(12).reshape(2, 6)
    fresh = biased_llama()
    load(fresh, tmp_path / "back", "back")  # its fingerprint fits, or it would be refused
    assert torch.equal(model.eval()(ids).logits, fresh(ids).logits)
