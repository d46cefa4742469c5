"""The papers' counts of adapter layers, on models of the papers' sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from sidepath.methods.bottleneck import Bottleneck
from tests.methods.kit import bert, gpt2, published, trained

LARGE = [((1024, 24), 6), ((1024, 24), 224), ((1280, 36), 8), ((1280, 36), 248)]


@pytest.mark.parametrize("size", [1, 4, 8, 16, 64])
def test_counts_of_houlsby_adapters_on_gpt3(shared: Path, size: int) -> None:
    """12,288 wide and 96 blocks deep: `2 L (2 d r + r + d)`."""
    count = trained(gpt2(12_288, 96), Bottleneck(size=size), transformers.GPT2Model)
    assert count == published(shared, "T15", f"AdapterH r={size} ")


@pytest.mark.parametrize(("shape", "size"), LARGE)
def test_counts_of_lin_adapters_on_gpt2(shared: Path, shape: tuple[int, int], size: int) -> None:
    width, layers = shape
    count = trained(gpt2(width, layers), Bottleneck("lin", size=size), transformers.GPT2Model)
    assert count == published(shared, "T3", f"AdapterL r={size} ")


def test_counts_of_adapter_drop_and_houlsbys_bert(shared: Path) -> None:
    base, model = bert(768, 12), transformers.BertModel
    pfeiffer = Bottleneck("pfeiffer", size=48)
    assert trained(base, pfeiffer, model) == published(shared, "T2", "AdptD 0.9M")
    dropped = Bottleneck("pfeiffer", size=48, drop=8)
    assert trained(base, dropped, model) == published(shared, "T2", "AdptD 0.3M")
    norms = Bottleneck(size=64, train_whole=("layer.*.LayerNorm",))
    assert trained(base, norms, model) == published(shared, "Houlsby 3.4", "adapters m=64")
