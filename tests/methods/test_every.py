"""Every method on every kind of transformer: the promises that all of them keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sidepath.errors import SidepathError
from sidepath.injection.registry import registry_of, require_registry
from sidepath.injection.surgery import disabled, remove
from sidepath.methods import METHODS
from sidepath.methods.base import Method
from sidepath.store.adapter import inject, load
from sidepath.store.plan import plan
from tests.conftest import randomise
from tests.methods.architectures import ARCHITECTURES, inputs_of, logits_of

OPTIONS: dict[str, dict[str, Any]] = {
    "prompt": {"tokens": 5},
    "prefix": {"tokens": 5, "hidden": 24},
    "vera": {"r": 16, "d_start": 1.0},
    "bottleneck": {"size": 8},
    "versatile-lm": {"size": 8},
    "intrinsic": {"d": 40},
}
"""Settings under which a method is tested, where its defaults are not for a model 32 wide."""

IMPOSSIBLE = {
    ("bitfit", "llama"): "no bias to train",
    ("bitfit", "mistral"): "no bias to train",
    ("bitfit", "gemma"): "no bias to train",
    ("bitfit", "t5"): "no bias to train",
    ("bitfit", "mixture"): "no bias to train",
    ("prompt", "t5"): "encoder and decoder are called apart",
    ("prompt", "vit"): "takes no embeddings of tokens",
    ("prefix", "t5"): "encoder and decoder are called apart",
    ("prefix", "vit"): "takes no embeddings of tokens",
    ("prefix", "bert"): "attention is not causal",
    ("prefix", "roberta"): "attention is not causal",
    ("prefix", "deberta-v2"): "attention is not causal",
    ("versatile-lm", "vit"): "token-embedding",
    # It composes adapters that are on the model: `test_fusion.py` puts them there.
    **{("fusion", name): "no bottleneck adapter stands" for name in ARCHITECTURES},
}
"""What a method cannot do, and why, in its error's words."""

NOT_FRESH_EQUAL: set[str] = {"prompt", "prefix"}
"""Methods whose paper promises no equality with the base before the first step."""

PAIRS = [(method, name) for method in METHODS for name in ARCHITECTURES]


def settings_of(method: str) -> Method:
    return METHODS[method](**OPTIONS.get(method, {}))


def injected(method: str, name: str) -> Any:
    """The model with a fresh adapter, or the test ends here with the error that is expected."""
    model = ARCHITECTURES[name]()
    if (method, name) in IMPOSSIBLE:
        with pytest.raises(SidepathError, match=IMPOSSIBLE[method, name]):
            inject(model, settings_of(method), "a")
        assert registry_of(model) is None
        pytest.skip(f"{method} cannot adapt {name}: {IMPOSSIBLE[method, name]}")
    inject(model, settings_of(method), "a")
    return model


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_fresh_it_changes_nothing_and_removed_it_leaves_nothing(method: str, name: str) -> None:
    plain, inputs = ARCHITECTURES[name](), inputs_of(name)
    with torch.no_grad():
        expected = logits_of(plain, inputs)
    state = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    model = injected(method, name)
    with torch.no_grad():
        if method not in NOT_FRESH_EQUAL:
            assert torch.equal(logits_of(model, inputs), expected)
        with disabled(model):
            assert torch.equal(logits_of(model, inputs), expected)
    randomise(require_registry(model).adapter("a").parameters())
    with torch.no_grad():
        assert not torch.allclose(logits_of(model, inputs), expected, atol=1e-4)
    remove(model, "a")
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    with torch.no_grad():
        assert torch.equal(logits_of(model, inputs), expected)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_gradients_reach_every_trained_parameter_and_no_other(
    method: str, name: str, train: bool
) -> None:
    model = injected(method, name).train(train)
    installed = require_registry(model).adapter("a")
    randomise(installed.parameters())
    logits_of(model, inputs_of(name)).square().sum().backward()
    trained = {f"{path}.{n}": p for path, d in installed.deltas.items()
               for n, p in d.named_parameters()}  # fmt: skip
    assert trained
    silent = [key for key, p in trained.items() if p.grad is None or not p.grad.any()]
    assert [key for key in silent if not _untouched(method, name, key)] == []
    own = set(trained.values())
    assert all(p.grad is None for p in model.parameters() if p not in own)


def _untouched(method: str, name: str, key: str) -> bool:
    """What a batch like this one need not reach, whatever trains it."""
    # A bias of the keys moves every score of a row alike, which the softmax takes out again.
    if "key" in key or "k_proj" in key:
        return key.endswith("bias")
    return False


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_saved_and_loaded_it_answers_alike(method: str, name: str, tmp_path: Path) -> None:
    model, inputs = injected(method, name), inputs_of(name)
    installed = require_registry(model).adapter("a")
    randomise(installed.parameters())
    with torch.no_grad():
        expected = logits_of(model, inputs)
    planned = plan(ARCHITECTURES[name](), settings_of(method), tokens=8, batch_size=2)
    assert planned.trainable == sum(p.numel() for p in installed.parameters())
    from sidepath.store.adapter import Adapter

    folder = Adapter("a", model).save(tmp_path / "a")
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert abs(size - planned.adapter_bytes) <= 0.01 * size
    again = ARCHITECTURES[name]()
    state = torch.get_rng_state()
    load(again, folder, "b")
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(logits_of(again, inputs), expected)
