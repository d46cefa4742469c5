"""The model's side of an encoder: texts in tokens, and a vector or logits a text (floor 5).

Dimensions: B rows, T tokens, D features or classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.errors import RequestRefused
from sidepath.injection.registry import registry_of
from sidepath.injection.surgery import route
from sidepath.serve.pooling import Pooling

OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Kinds of model whose first position is not 0 but behind the padding token's number."""


class Encoding:
    """An encoder of `transformers`, put into eval mode, with its tokenizer. `pooling`: texts become
    vectors; None: the model classifies them.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, pooling: Pooling | None) -> None:
        self.model: Any = model.eval()
        self.tokenizer, self.pooling = tokenizer, pooling
        config: Any = self.model.config
        config = config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        own = vars(config).get("max_position_embeddings") or 512
        own -= config.pad_token_id + 1 if config.model_type in OFFSET else 0
        asked = None if pooling is None else pooling.most_tokens
        self.most_tokens = min(own, asked or own)
        """Longest text."""

    def tokens_of(self, texts: Sequence[str | Sequence[int]]) -> list[tuple[int, ...]]:
        """Texts in tokens. Errors: `RequestRefused` that names each that is empty or too long."""
        found = [
            tuple(self.tokenizer(text)["input_ids"] if isinstance(text, str) else text)
            for text in texts
        ]
        faults = [
            f"input {number} has {len(tokens)} tokens: from 1 to {self.most_tokens} are possible"
            for number, tokens in enumerate(found)
            if not 1 <= len(tokens) <= self.most_tokens
        ]
        faults += [
            f"input {number} has tokens that the base does not know"
            for number, tokens in enumerate(found)
            if any(not 0 <= token < self.vocabulary for token in tokens)
        ]
        if faults:
            raise RequestRefused(
                "the input cannot be taken",
                faults=faults,
                hint="part a long text, or shorten it: nothing is cut off in silence",
            )
        return found

    @torch.no_grad()
    def rows(
        self, texts: Sequence[Sequence[int]], names: Sequence[str | None]
    ) -> list[list[float]]:
        """The vector, or the logits, of each text by the adapter of that name on the model."""
        # Rows of one adapter together: their products are shared.
        order = sorted(range(len(texts)), key=lambda at: names[at] or "")
        ids_BT, mask_BT = self._padded([texts[at] for at in order])
        if registry_of(self.model) is None:
            out = self.model(input_ids=ids_BT, attention_mask=mask_BT)
        else:
            with route(self.model, [names[at] for at in order]):
                out = self.model(input_ids=ids_BT, attention_mask=mask_BT)
        if self.pooling is None:
            found_BD = out.logits.float()
        else:
            found_BD = self.pooling.of(out.last_hidden_state, mask_BT)
        found: list[list[float]] = found_BD[torch.tensor(order).argsort()].tolist()
        return found

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        device = self.model.device
        return ids.to(device), mask.to(device)
