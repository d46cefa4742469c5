"""Rows of the vocabulary, trained: those of new tokens, and of others that are named.

The base's own table is neither changed nor made longer: an embedding and a head give what the rows
say at their ids, and what the base says at all others. (The idea of training chosen rows is PEFT's
`trainable_token_indices`.)

Dimensions: `...` any leading, N rows, of which K are the base's too and M are added, D features,
V rows of the base's table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidepath.core.delta import Delta, accumulation_dtype
from sidepath.core.views import DenseView, EmbeddingView, PackedView, View
from sidepath.errors import ConfigError, UnsupportedModule

LARGEST_ID = 2**31 - 1
MOST_TOKENS = 65_536
"""Rows of one adapter: tables of all tokens are trained whole, not row by row."""


class TokenRows(Delta):
    """Rows `R (N, D)` that stand where the base's do at the ids of some tokens.

    Beside an embedding: `y[t] = R[n]` where `x[t] = ids[n]`. Beside a head: the logit of `ids[n]`
    is `R[n] x` (and the base's bias, where it has one there); ids from V on have logits of their
    own, behind the base's V. A fresh one has the base's rows, so that no output changes to the bit,
    and the mean of all the base's rows at the ids that the base has no row for.
    """

    shares = True
    low: Tensor
    """Which rows are of ids that the base has a row for too, and `high`: which are added."""
    high: Tensor
    order: Tensor
    """The rows by ascending id."""
    low_ids: Tensor
    sorted_ids: Tensor
    rows: nn.Parameter
    reach: int
    """The ids it knows end here, if it knows more than the base; else 0."""

    def __init__(
        self,
        view: View,
        ids: Sequence[int],
        dtype: torch.dtype,
        rows_ND: Tensor | None = None,
        *,
        fresh: bool = True,
    ) -> None:
        """`rows` are kept where given; with neither these nor `fresh` ones, some will be lent."""
        super().__init__()
        table_VD = table_of(view)
        self.size = len(table_VD)
        low, high = split(ids, self.size)
        self.reach = self.size + len(high) if high else 0
        order = sorted(range(len(ids)), key=lambda n: ids[n])
        at = {"low": low, "high": high, "order": order}
        at |= {"low_ids": [ids[n] for n in low], "sorted_ids": [ids[n] for n in order]}
        for name, numbers in at.items():
            index = torch.tensor(numbers, dtype=torch.long, device=table_VD.device)
            self.register_buffer(name, index, persistent=False)
        if rows_ND is not None:
            self.rows = nn.Parameter(rows_ND.to(table_VD.device))
        elif fresh:
            self.rows = nn.Parameter(self._start(table_VD.detach(), dtype))

    def _start(self, table_VD: Tensor, dtype: torch.dtype) -> Tensor:
        count = len(self.sorted_ids)
        rows_ND = torch.empty(count, table_VD.shape[1], dtype=dtype, device=table_VD.device)
        rows_ND[self.low] = table_VD[self.low_ids].to(dtype)
        if self.reach:
            rows_ND[self.high] = table_VD.mean(0, dtype=torch.float32).to(dtype)
        return rows_ND

    def lend(self, rows_ND: nn.Parameter) -> None:
        """Use the rows of another delta, beside a module of the same table. In place."""
        self._parameters.pop("rows", None)
        self.__dict__["rows"] = rows_ND

    def known(self, x: Tensor) -> Tensor:
        """Ids that the base has a row for, in the place of those that only the rows are for."""
        if not self.reach or x.is_floating_point():
            return x
        return x.masked_fill((x >= self.size) & (x < self.reach), 0)

    def forward(self, x: Tensor, base: View, *args: Any, **kwargs: Any) -> Tensor:
        return self.onto(base(self.known(x), *args, **kwargs), x, base)

    def onto(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        if isinstance(base, EmbeddingView):
            return self._looked_up(y, x, base)
        return self._with_logits(y, x, base)

    def _looked_up(self, y: Tensor, x: Tensor, base: EmbeddingView) -> Tensor:
        at = torch.searchsorted(self.sorted_ids, x.contiguous()).clamp(max=len(self.sorted_ids) - 1)
        mine = self.sorted_ids[at] == x
        rows = F.embedding(self.order[at], self.rows).to(y.dtype)
        if base.output_scale != 1:  # in the dtype of the table, as the module does it
            rows = rows * torch.tensor(base.output_scale, device=y.device).to(y.dtype)
        return torch.where(mine[..., None], rows, y)

    def _with_logits(self, y: Tensor, x: Tensor, base: View) -> Tensor:
        """As a difference where the base has a logit too: that is exactly zero at the start."""
        if len(self.low):
            own_KD = table_of(base)[self.low_ids]
            wide = accumulation_dtype(torch.promote_types(own_KD.dtype, self.rows.dtype))
            change_KD = self.rows[self.low].to(wide) - own_KD.to(wide)
            y = y.index_add(-1, self.low_ids, F.linear(x, change_KD.to(x.dtype)).to(y.dtype))
        if not self.reach:
            return y
        added = F.linear(x, self.rows[self.high].to(x.dtype)).to(y.dtype)
        return torch.cat([y[..., : self.size], added, y[..., self.reach :]], -1)

    @torch.no_grad()
    def folded(self, base: View, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The table with the rows in it, longer where they reach beyond it, and as long a bias."""
        table_VD = table_of(base).detach()
        length = max(self.size, self.reach)
        merged = table_VD.new_empty(length, table_VD.shape[1])
        merged[: self.size] = table_VD
        ids = torch.cat([self.low_ids, torch.arange(self.size, length, device=merged.device)])
        merged[ids] = self.rows[torch.cat([self.low, self.high])].to(merged.dtype)
        tensors = {"weight": merged}
        bias = _bias_of(base)
        if self.reach and bias is not None:
            tensors["bias"] = F.pad(bias.detach(), (0, length - self.size))
        return tensors

    def touches(self, base: View) -> set[str]:
        return {"weight"} if not self.reach or _bias_of(base) is None else {"weight", "bias"}

    def longer(self, base: View) -> dict[str, tuple[int, ...]]:
        if not self.reach:
            return {}
        shapes = {"weight": (self.reach, table_of(base).shape[1]), "bias": (self.reach,)}
        return {name: shapes[name] for name in self.touches(base)}


def table_of(view: View) -> Tensor:
    """(V, D): the rows of an embedding or of a head, as the module holds them.

    Errors: `UnsupportedModule` for any other module, and for packed ones.
    """
    linear = isinstance(view, DenseView) and view.kind in ("linear", "embedding")
    if not linear or isinstance(view, PackedView):
        raise UnsupportedModule(
            "rows of tokens are trained beside an embedding and a linear head",
            found=view.base_class.__name__,
            hint="load the base without packing its head",
        )
    assert isinstance(view, DenseView)
    return view.weight


def _bias_of(view: View) -> Tensor | None:
    return view.bias if isinstance(view, DenseView) else None


def split(ids: Sequence[int], size: int) -> tuple[list[int], list[int]]:
    """The places in `ids` of those below `size`, in their order, and of those from it on, by id.

    Errors: `ConfigError` unless the latter follow one another from `size` on.
    """
    low = [n for n, one in enumerate(ids) if one < size]
    high = sorted((n for n, one in enumerate(ids) if one >= size), key=lambda n: ids[n])
    found = [ids[n] for n in high]
    if found != list(range(size, size + len(high))):
        raise ConfigError(
            "ids of added tokens follow one another, from the first that the base has no row for",
            found=", ".join(map(str, found[:8])),
            expected=f"{size} to {size + len(high) - 1}",
        )
    return low, high


def share(deltas: Mapping[str, Delta], views: Mapping[str, View]) -> None:
    """Let rows of one table be one parameter, in the first delta that has them. In place."""
    first: dict[Tensor, nn.Parameter] = {}
    for path, delta in deltas.items():
        if isinstance(delta, TokenRows):
            table = table_of(views[path])
            if table in first:
                delta.lend(first[table])
            else:
                first[table] = delta.rows
