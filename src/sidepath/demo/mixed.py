"""One batch in which each row is answered by its own adapter, held against one row at a time.

Dimensions: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.injection.registry import registry_of
from sidepath.injection.surgery import activate, route

NEW_TOKENS = 24


@dataclass(frozen=True)
class MixedBatch:
    """What the comparison found."""

    rows: int
    adapters: list[str | None]
    """The adapter of each row; None is the base."""
    tokens_equal: bool
    """Greedy tokens of every row equal those of the row alone."""
    max_abs: float
    """Largest difference of the next token's logits between the batch and the row alone."""
    texts: list[str]

    @property
    def equal(self) -> bool:
        """Same tokens, and logits equal but for rounding."""
        return self.tokens_equal and self.max_abs < 1e-3


def mixed_batch(
    model: Any, tokenizer: Any, tasks: Sequence[tuple[str, Sequence[dict[str, str]]]]
) -> MixedBatch:
    """Route two prompts of each task to its adapter and one of each to the base, in one batch.

    The active adapter is what it was before, afterwards.
    """
    names: list[str | None] = []
    prompts: list[str] = []
    for pick in (0, 1, 2):
        for name, rows in tasks:
            names.append(None if pick == 2 else name)
            prompts.append(rows[pick]["prompt"])
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    registry = registry_of(model)
    active = None if registry is None else registry.routing.active
    with torch.no_grad(), route(model, names):
        together_BV, tokens_BT = _answers(model, tokenizer, ids)
    differences, same, texts = [], [], []
    for row, adapter in enumerate(names):
        activate(model, adapter)
        alone_BV, alone_BT = _answers(model, tokenizer, [ids[row]])
        differences.append(float((together_BV[row] - alone_BV[0]).abs().max()))
        mine, alone = _until_end(tokens_BT[row], tokenizer), _until_end(alone_BT[0], tokenizer)
        same.append(mine == alone)
        texts.append(tokenizer.decode(mine))
    activate(model, active)
    return MixedBatch(len(names), names, all(same), max(differences), texts)


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Logits (B, V) after each prompt and greedy tokens (B, T); prompts padded on the left."""
    length = max(len(row) for row in ids)
    pad = tokenizer.pad_token_id
    ids_BT = torch.tensor([[pad] * (length - len(row)) + list(row) for row in ids])
    mask_BT = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    assert isinstance(model, nn.Module)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT).logits
    tokens_BT = model.generate(  # type: ignore[operator]
        input_ids=ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=pad,
    )
    return logits_BTV[:, -1], tokens_BT[:, length:]


def _until_end(tokens_T: Tensor, tokenizer: Any) -> list[int]:
    """The tokens before the end token."""
    tokens: list[int] = tokens_T.tolist()
    end = tokenizer.eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens
