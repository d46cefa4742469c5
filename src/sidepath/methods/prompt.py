"""Prompt tuning: trained embeddings before the input's (Lester et al., 2021, section 2).

Dimensions: B rows, T tokens, P trained positions, D features of an embedding, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sidepath.config import check, require
from sidepath.core.delta import Delta
from sidepath.core.views import EmbeddingView, View
from sidepath.errors import UnsupportedModule
from sidepath.methods.ahead import (
    MAX_POSITIONS,
    Ahead,
    AheadMethod,
    BodyCall,
    config_of,
    cut,
    word_embedding,
)
from sidepath.methods.base import Saved, filled


@dataclass(frozen=True)
class PromptTuning(AheadMethod):
    """`[P; E(x)]` in the place of the embeddings `E(x)`: P is trained, the base is frozen.

    The model then knows `tokens` positions less of its context. Of an encoder the trained
    positions stand before the first token; an encoder-decoder has no one call to put them in.
    """

    method = "prompt"

    tokens: int = 20
    """Trained positions before each row; they take as many of the model's context."""
    start: Literal["vocabulary", "normal"] = "vocabulary"
    """Where they start: at the embeddings of tokens drawn from the vocabulary, or normal with the
    embeddings' own standard deviation."""
    every_layer: bool = False
    """Train what stands at these positions before every layer, not before the first one only: the
    LoRA paper's prefix-layer tuning (section 5.1), L D numbers a position."""
    train_whole: tuple[str, ...] = ()
    """Modules trained whole beside them, such as a classification head."""

    def __post_init__(self) -> None:
        check(self)
        require(self, {"tokens": 1 <= self.tokens <= MAX_POSITIONS})

    def body_delta(self, view: View, tensors: Saved = None) -> Delta:
        return filled(lambda: Prompt(view, self.tokens, self.start, self.every_layer), tensors)


class Prompt(Ahead):
    """The embeddings `(P, D)` before each row, in float32; and with every layer what each later
    layer sees at their positions, `(L - 1, P, D)`, instead of what the layer before it made there.
    """

    def __init__(
        self,
        base: View,
        count: int,
        start: Literal["vocabulary", "normal"],
        every_layer: bool = False,
    ) -> None:
        super().__init__(base, count)
        embedding = word_embedding(base.module)
        self.embeddings = nn.Parameter(_start(embedding, count, start))
        self.activations: nn.Parameter | None = None
        later = len(_layers(base.module)) - 1 if every_layer else 0
        if later:
            drawn_ND = _start(embedding, count * later, start)
            self.activations = nn.Parameter(drawn_ND.view(later, count, -1))

    def begin(self, base: View, body: BodyCall) -> Any:
        options = body.options
        x_BTD = options.get("inputs_embeds")
        if x_BTD is None:
            x_BTD = word_embedding(base.module)(options.get("input_ids"))
        options["input_ids"] = None
        own_BPD = self.embeddings.to(x_BTD.dtype).expand(body.rows, -1, -1)
        options["inputs_embeds"] = torch.cat([own_BPD, x_BTD], dim=1)
        body.move(self.count, self.first, held=False)
        with self._at_every_layer(base.module):
            out = base(**options)
        return cut(out, self.count, base.module)

    @contextmanager
    def _at_every_layer(self, body: nn.Module) -> Iterator[None]:
        """Let the later layers see the trained activations, by hooks that are gone afterwards."""
        if self.activations is None:
            yield
            return

        def hook_of(own_PD: Tensor) -> Any:
            def replaced(layer: nn.Module, args: Any) -> Any:
                x_BTD = args[0]
                own_BPD = own_PD.to(x_BTD.dtype).expand(len(x_BTD), -1, -1)
                return torch.cat([own_BPD, x_BTD[:, self.count :]], dim=1), *args[1:]

            return replaced

        pairs = zip(_layers(body)[1:], self.activations, strict=True)
        hooks = [layer.register_forward_pre_hook(hook_of(own_PD)) for layer, own_PD in pairs]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def _start(embedding: nn.Module, count: int, start: str) -> Tensor:
    """(P, D) from torch's random state: rows of the vocabulary as the model sees them, or normal
    with their standard deviation.
    """
    view = EmbeddingView(embedding)
    table_VD = view.weight
    if start == "normal":
        drawn_PD = torch.randn(count, table_VD.shape[1], device=table_VD.device)
        return drawn_PD * table_VD.float().std() * view.output_scale
    ids_P = torch.randint(table_VD.shape[0], (count,), device=table_VD.device)
    return table_VD[ids_P].float() * view.output_scale


def _layers(body: nn.Module) -> list[nn.Module]:
    """The body's layers. Errors: `UnsupportedModule` where they are not one list of like width."""
    settings = config_of(body)
    lists = [
        list(module)
        for module in body.modules()
        if isinstance(module, nn.ModuleList) and len(module) == settings.num_hidden_layers
    ]
    weight = word_embedding(body).weight
    assert isinstance(weight, Tensor)
    if len(lists) != 1 or weight.shape[1] != settings.hidden_size:
        raise UnsupportedModule(
            "every_layer needs one list of layers as wide as the embeddings",
            found=f"{len(lists)} lists of {settings.num_hidden_layers} layers of "
            f"{settings.hidden_size} features, embeddings of {weight.shape[1]}",
            where=type(body).__name__,
        )
    return lists[0]
