"""The LoftQ start: nearer to the unquantised base, from weights that are checked and streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sidepath
from sidepath import LoRA
from sidepath.core.views import view_of
from sidepath.errors import ConfigError, StoreError
from sidepath.injection.quantising import quantise_
from sidepath.injection.registry import registry_of, require_registry
from sidepath.store import stored as module
from sidepath.store.adapter import inject
from sidepath.store.loading import load_tensors
from tests.conftest import outputs, randomise, tiny_gpt2, tiny_llama
from tests.store.quantised import packed, plain, stored

IDS = torch.tensor([[5, 9, 3, 17, 22], [1, 2, 3, 4, 5]])
LOFTQ = LoRA(r=8, start="loftq")


def errors(model: nn.Module, originals: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """For each adapted layer `|Q - W|` and `|Q + s B A - W|`."""
    registry = require_registry(model)
    found = {}
    deltas: Mapping[str, Any] = registry.adapter("x").deltas
    for path, delta in deltas.items():
        view: Any = registry.sides[path].view
        W, Q = originals[path].detach(), view.matrix()
        found[path] = (float((Q - W).norm()), float((delta.merged(Q) - W).norm()))
    return found


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_starts_nearer_to_the_unquantised_base(tmp_path: Path, make: Any) -> None:
    base = stored(make(), tmp_path / "base")
    model, exact = packed(base, "float32"), plain(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantised = (outputs(model, IDS) - outputs(exact, IDS)).norm()
    adapter = inject(model, LOFTQ, "x")
    modules = dict(exact.named_modules())
    W = {path: view_of(modules[path]).matrix() for path in adapter.deltas}  # type: ignore[union-attr]
    for path, (without, with_it) in errors(model, W).items():
        delta = adapter.deltas[path]
        assert with_it < 0.9 * without
        left = torch.linalg.svdvals(W[path].detach() - matrix_of(model, path))[delta.r :]  # type: ignore[arg-type, misc]
        assert with_it == pytest.approx(float(left.norm()), rel=1e-3), "the best of its rank"
    assert (outputs(model, IDS) - outputs(exact, IDS)).norm() < quantised
    sidepath.remove(model, "x")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def matrix_of(model: nn.Module, path: str) -> Tensor:
    view = view_of(model.get_submodule(path))
    assert view is not None
    return view.matrix()


def test_weights_may_be_given(tmp_path: Path) -> None:
    exact = tiny_llama()
    tensors = dict(exact.named_parameters())
    base = stored(exact, tmp_path / "base")
    started = []
    for originals in (tensors, base):
        model = tiny_llama()
        quantise_(model)
        adapter = inject(model, LOFTQ, "x", originals=originals)
        started.append([parameter.clone() for parameter in adapter.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*started, strict=True))


def test_layers_that_are_not_packed_start_as_ever(tmp_path: Path) -> None:
    base = stored(tiny_llama(), tmp_path / "base")
    model = packed(base)
    adapter: Any = inject(model, LoRA(r=4, targets=("lm_head", "q_proj"), start="loftq"), "x")
    assert not adapter.deltas["lm_head"].B.any()
    assert adapter.deltas["model.layers.0.self_attn.q_proj"].B.any()


def test_one_weight_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = stored(tiny_llama(), tmp_path / "base")
    model = packed(base)
    asked: list[int] = []

    def counted(path: Path, header: Any) -> Any:
        asked.append(len(header))
        return load_tensors(path, header)

    monkeypatch.setattr(module, "load_tensors", counted)
    adapter = inject(model, LOFTQ, "x")
    assert asked == [1] * len(adapter.deltas)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    base = stored(tiny_llama(), tmp_path / "base")
    with pytest.raises(ConfigError, match="needs a quantised base"):
        inject(plain(base), LOFTQ, "x")
    with pytest.raises(ConfigError, match="originals are read by"):
        inject(packed(base), LoRA(), "x", originals=base)
    other = tiny_llama()
    randomise(other.parameters())
    folder = stored(other, tmp_path / "other")
    model = packed(base)
    with pytest.raises(StoreError, match="another base's"):
        inject(model, LOFTQ, "x", originals=folder)
    with pytest.raises(StoreError, match=r"(?s)lack weights.*q_proj.weight: missing"):
        inject(model, LOFTQ, "x", originals={})
    with pytest.raises(StoreError, match="lack weights"):
        inject(model, LOFTQ, "x", originals=stored(packed(base), tmp_path / "packed"))
    nowhere = tiny_llama()
    quantise_(nowhere)
    with pytest.raises(ConfigError, match="needs the unquantised weights"):
        inject(nowhere, LOFTQ, "x")
    name = "model.layers.0.mlp.up_proj.weight"
    change: Callable[[Tensor], Tensor]
    for change, said in (
        (lambda weight: weight[:1], "up_proj.weight: shape"),
        (lambda weight: weight.where(weight < weight.max(), torch.nan), "not finite"),
    ):
        tensors = {key: t.detach() for key, t in tiny_llama().named_parameters()}
        tensors[name] = change(tensors[name])
        with pytest.raises(StoreError, match=said):
            inject(model, LOFTQ, "x", originals=tensors)
    assert registry_of(model) is None
