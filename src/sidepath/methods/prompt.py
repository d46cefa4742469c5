"""Prompt tuning: trained embeddings before the input's (Lester et al., 2021, section 2).

Dimensions: B rows, T tokens, P trained positions, D features of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sidepath.config import check, require
from sidepath.core.delta import Delta
from sidepath.core.views import EmbeddingView, View
from sidepath.methods.ahead import Ahead, BodyCall, cut, word_embedding
from sidepath.methods.base import Method, Selection, filled

MAX_POSITIONS = 65_536


@dataclass(frozen=True)
class PromptTuning(Method):
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
    train_whole: tuple[str, ...] = ()
    """Modules trained whole beside them, such as a classification head."""

    def __post_init__(self) -> None:
        check(self)
        require(self, {"tokens": 1 <= self.tokens <= MAX_POSITIONS})

    def selection(self) -> Selection:
        return Selection((), body=True, train_whole=self.train_whole)

    @property
    def positions(self) -> int:
        return self.tokens

    def body_delta(self, view: View, tensors: Mapping[str, Tensor] | None = None) -> Delta:
        return filled(lambda: Prompt(view, self.tokens, self.start), tensors)


class Prompt(Ahead):
    """The embeddings `(P, D)` before each row, in float32."""

    def __init__(self, base: View, count: int, start: Literal["vocabulary", "normal"]) -> None:
        super().__init__(base, count)
        self.embeddings = nn.Parameter(_start(word_embedding(base.module), count, start))

    def begin(self, base: View, body: BodyCall) -> Any:
        options = body.options
        x_BTD = options.get("inputs_embeds")
        if x_BTD is None:
            x_BTD = word_embedding(base.module)(options.get("input_ids"))
        options["input_ids"] = None
        own_BPD = self.embeddings.to(x_BTD.dtype).expand(body.rows, -1, -1)
        options["inputs_embeds"] = torch.cat([own_BPD, x_BTD], dim=1)
        body.move(self.count, self.first, held=False)
        return cut(base(**options), self.count, base.module)


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
