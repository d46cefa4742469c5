"""A method of your own in 40 lines: a gain for each output of a matrix, as (IA)³ has them.

    python examples/custom_method.py OUTPUT

It goes through every verb: inject, train, save, load, merge, unmerge, remove.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import sidepath
from sidepath import TrainConfig
from sidepath.core.delta import WeightDelta
from sidepath.core.views import DenseView, View
from sidepath.methods import METHODS
from sidepath.methods.base import Method, Saved, Selection, Site, filled


# The method: what is set, where it acts, and the delta that it puts there.
@dataclass(frozen=True)
class Gains(Method):
    """`ΔW = diag(g) W0`: every output of a matrix gets a trained gain, which starts at zero."""

    method = "gains"
    targets: tuple[str, ...] = ("all-linear",)
    """Modules to adapt, in the form of LoRA's targets."""
    train_whole: tuple[str, ...] = ()
    """Modules trained whole in a copy of the adapter's own."""

    def selection(self) -> Selection:
        return Selection(self.targets, train_whole=self.train_whole)

    def dense_delta(self, site: Site, view: DenseView, tensors: Saved = None) -> WeightDelta:
        return filled(lambda: Gain(view), tensors)  # type: ignore[return-value]


class Gain(WeightDelta):
    """The gains `g (O)` of one matrix."""

    def __init__(self, view: DenseView) -> None:
        super().__init__()
        self.bias = None
        self.g = nn.Parameter(torch.zeros(view.shape[0], device=view.weight.device))

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        bias = base.module.bias
        product = y if bias is None else y - bias
        return y + (self.g * product).to(y.dtype)

    @torch.no_grad()
    def merged(self, W0_OI: Tensor, out_OI: Tensor | None = None) -> Tensor:
        made_OI = (W0_OI * (1 + self.g[:, None])).to(W0_OI.dtype)
        return made_OI if out_OI is None else out_OI.copy_(made_OI)


METHODS[Gains.method] = Gains  # files and the command line know it by this name


def main(output: Path) -> None:
    """Take it through the verbs."""
    folder = sidepath.embedded_base()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("One two three", return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(ids).logits
        adapter = sidepath.inject(model, Gains(), name="gains")
        print(f"a fresh one changes nothing: {torch.equal(model(ids).logits, before)}")

    rows = [{"prompt": "One two", "completion": " three."}] * 4
    data = sidepath.load_data(rows, tokenizer, max_tokens=16)
    steps = [*sidepath.train(model, data, TrainConfig(steps=10, learning_rate=1e-2))]
    print(f"it learns: {steps[-1].loss < steps[0].loss}")

    adapter.save(output / "gains")
    with torch.no_grad():
        tuned = model(ids).logits
        sidepath.merge(model, "gains")
        same = torch.allclose(model(ids).logits, tuned, atol=1e-4)
        print(f"merged equals un-merged: {same}")
        sidepath.unmerge(model)
        sidepath.remove(model, "gains")
        print(f"the base is what it was: {torch.equal(model(ids).logits, before)}")
        sidepath.load(model, output / "gains", "again")
        print(f"loaded again: {torch.equal(model(ids).logits, tuned)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
