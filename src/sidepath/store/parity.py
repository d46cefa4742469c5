"""How far a merged model's outputs are from the un-merged model's, and how far they may be.

Dimensions: T positions, V outputs (the vocabulary, or the classes) (floor 4).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sidepath.errors import DataError, StoreError
from sidepath.store.configs import has_tokenizer, tokenizer_in
from sidepath.store.tensors import read_json

PARITY = "parity.json"
"""The file of a merged folder that holds what was measured."""
CALIBRATION = (
    "The harbour master counted the boats twice that evening, because the first number had "
    "seemed too small and the wind was rising.",
    "A recipe for four people: two onions, a cup of red lentils, one spoon of cumin, salt, and "
    "enough water to cover everything by a finger's width.",
    "def area(width, height):\n    return width * height  # both in metres",
    "If the train leaves at 7:45 and the journey takes 2 hours and 30 minutes, at what time "
    "does it arrive?",
    "Nobody had told her that the museum was closed on Mondays, so she sat on its steps and "
    "read the guide book instead.",
    "name: Alice | age: 31 | city: Lisbon | likes: chess, long walks, strong coffee",
)
"""Text of our own, of several kinds, that merges are measured on when no other is given."""

MAX_TOKENS = 96
"""Positions of one calibration row that are looked at."""
MAX_POSITIONS = 2048
"""Positions of all rows together that are looked at."""
_RUNS, _OUTPUT_BYTES = 5, 2**28
"""How many runs' outputs are held at once, and the memory they may take."""


@dataclass(frozen=True)
class Parity:
    """A merged model beside the un-merged one, on the same rows, computed in float32."""

    max_abs: float
    """Largest difference of two outputs."""
    mean_abs: float
    """Mean difference of two outputs."""
    top1: float
    """Share of positions whose largest output is the same."""
    kl: float
    """Mean Kullback-Leibler divergence of the un-merged distribution from the merged, in nats."""
    tolerance: float
    """The largest `max_abs` that rounding explains."""
    mean_tolerance: float
    """The largest `mean_abs` that rounding explains."""
    effect: float
    """Largest difference the adapter itself makes to the base's outputs."""
    positions: int
    """Positions compared."""

    @property
    def holds(self) -> bool:
        """Whether the two models agree within the tolerances (a NaN never does)."""
        return self.max_abs <= self.tolerance and self.mean_abs <= self.mean_tolerance

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def read_parity(path: Path) -> tuple[dict[str, str], Parity | None]:
    """A merged folder's `parity.json`: the merged adapters' names by the digest of their weights,
    and what was measured; None where measuring was skipped.

    Errors: `StoreError` for a file that is missing or malformed.
    """
    try:
        values = read_json(path)
        merged = {entry["digest"]: entry["name"] for entry in values["adapters"]}
        texts = all(isinstance(text, str) for pair in merged.items() for text in pair)
        skipped = values.get("skipped") is True
        names = [field.name for field in fields(Parity)]
        measured = {} if skipped else {name: values[name] for name in names}
        numbers = all(
            type(value) in (int, float) and math.isfinite(value) for value in measured.values()
        )
        if not texts or not numbers:
            raise ValueError("names and digests are texts, measures are finite numbers")
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            "a merged folder's record of its adapters is malformed",
            where=path,
            found=repr(error),
            hint="merge again",
        ) from error
    return merged, None if skipped else Parity(**measured)


def compare(
    unmerged: Sequence[Tensor],
    merged: Sequence[Tensor],
    base: Sequence[Tensor],
    noise: Sequence[Tensor],
) -> Parity:
    """Measure a merged model's outputs, row by row (T, V), against the un-merged model's.

    `base` are the outputs without the adapter, of the first rows and the tokens that it knows;
    `noise` is how far the outputs of one and the same merged model move when its weights are
    disturbed as rounding would (`disturbed`). The tolerances are four times that, since it is one
    draw of the noise, and `256 * 2^-23` of the largest output, for float32 arithmetic in another
    order. So they follow the dtype, the depth and the model's own sensitivity, and a wrong merge,
    which errs by as much as the adapter does, stands out.
    """
    largest = torch.stack([want_TV.abs().max() for want_TV in unmerged]).max()
    arithmetic = 256 * 2.0**-23 * float(largest)
    difference = _sizes(one - other for one, other in zip(unmerged, merged, strict=True))
    disturbance = _sizes(noise)
    alike, divergence = 0, 0.0
    for want_TV, got_TV in zip(unmerged, merged, strict=True):
        p_TV, q_TV = want_TV.log_softmax(-1), got_TV.log_softmax(-1)
        divergence += float((p_TV.exp() * (p_TV - q_TV)).sum(dtype=torch.float64))
        alike += int((want_TV.argmax(-1) == got_TV.argmax(-1)).sum())
    positions = sum(len(want_TV) for want_TV in unmerged)
    return Parity(
        max_abs=difference.largest,
        mean_abs=difference.mean,
        top1=alike / positions,
        kl=max(0.0, divergence / positions),
        tolerance=4 * disturbance.largest + arithmetic,
        mean_tolerance=4 * disturbance.mean + arithmetic,
        effect=_sizes(
            one[:, : other.shape[1]] - other for one, other in zip(unmerged, base, strict=False)
        ).largest,
        positions=positions,
    )


class _Sizes(NamedTuple):
    largest: float
    mean: float


def _sizes(rows: Iterable[Tensor]) -> _Sizes:
    """The largest and the mean absolute value of all rows' numbers; NaN where one is NaN."""
    largest, total, count = torch.tensor(0.0), 0.0, 0
    for row_TV in rows:
        sizes_TV = row_TV.abs()
        largest = torch.maximum(largest, sizes_TV.max())
        total += float(sizes_TV.sum(dtype=torch.float64))
        count += sizes_TV.numel()
    return _Sizes(float(largest), total / count)


def disturbed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor with the noise of one rounding to `dtype`; the same for each `name`.

    Rounding changes a number by a relative error that is spread evenly over at most half a step,
    `eps / 2`, to both sides: a standard deviation of `eps / (2 sqrt(3))`.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    size = torch.finfo(dtype).eps / (2 * math.sqrt(3))
    return noise.mul_(size).add_(1).mul_(tensor)


def rows_with(row: Sequence[int], ids: Sequence[int]) -> list[list[int]]:
    """Rows in which each of some tokens stands behind the beginning of another row: 32 in one,
    and of more than 256 tokens so many.
    """
    chosen = ids[:: max(1, -(-len(ids) // 256))]
    starts = range(0, len(chosen), 32)
    return [[*row[:8], *chosen[start : start + 32]] for start in starts]


@torch.no_grad()
def outputs_of(model: nn.Module, rows: Iterable[Sequence[int]]) -> list[Tensor]:
    """The model's outputs (T, V) for each row of token ids: logits, or its last hidden states."""
    settings = model.config
    device = next(model.parameters()).device
    outputs = []
    for row in rows:
        ids_BT = torch.tensor([list(row)], device=device)
        extra = {"decoder_input_ids": ids_BT} if settings.is_encoder_decoder else {}  # type: ignore[union-attr]
        found = model(input_ids=ids_BT, **extra)
        output = found["logits"] if "logits" in found else found[0]
        outputs.append(output.float().reshape(-1, output.shape[-1]).cpu())
    return outputs


def calibration_rows(
    folder: Path, vocabulary: int, texts: Sequence[str] | None = None
) -> list[list[int]]:
    """Token ids of the calibration texts, with the tokenizer in `folder`.

    Of each text the first 96 tokens; of all together the first 2,048, or as many as 256 MiB hold
    the outputs of in five runs. Without a tokenizer and without texts: fixed pseudo-random ids,
    never 0, the usual padding.

    Errors: `DataError` for texts that no tokenizer is there for, or that give no tokens;
    `StoreError` for a tokenizer that cannot be used.
    """
    if not has_tokenizer(folder):
        if texts is not None:
            raise DataError("calibration texts need a tokenizer in the base's folder", where=folder)
        return _made_up_rows(vocabulary)
    tokenizer, given = tokenizer_in(folder), CALIBRATION if texts is None else texts
    encoded = [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in given]
    rows = [[token for token in row if token < vocabulary] for row in encoded]
    left = max(1, min(MAX_POSITIONS, _OUTPUT_BYTES // (_RUNS * 4 * vocabulary)))
    kept = []
    for row in rows:
        if row[:left]:
            kept.append(row[:left])
        left -= len(row[:left])
    if not kept:
        raise DataError("the calibration texts give no tokens", where=folder)
    return kept


def _made_up_rows(vocabulary: int) -> list[list[int]]:
    return [
        [
            1 + (row * 7919 + 104_729 * (column + 1) * (column + row + 1)) % (vocabulary - 1)
            for column in range(24)
        ]
        for row in range(len(CALIBRATION))
    ]
