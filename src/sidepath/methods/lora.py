"""LoRA: a low-rank delta of each adapted matrix (Hu et al., 2021, section 4.1).

Dimensions: `...` any leading, O out, I in, R rank, N parts of a fused projection,
P adapted rows in all (O when the whole matrix is adapted).
"""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from sidepath.config import check, require
from sidepath.core.delta import Delta
from sidepath.core.views import DenseView, View
from sidepath.methods.base import AllSaved, Dtype, Method, Saved, Selection, Site, Views, dtype_of
from sidepath.methods.dora import Dora, refuse
from sidepath.methods.lowrank import AtPlace, LowRank
from sidepath.methods.rebased import Rebased
from sidepath.methods.tokens import LARGEST_ID, MOST_TOKENS, TokenRows

T = TypeVar("T")
MAX_RANK = 65_536
MAX_ALPHA = 1e6
REBASED = ("pissa", "olora")
"""Starts away from zero, whose own product is taken off again."""


@dataclass(frozen=True)
class LoRA(Method):
    """`y = W0 x + s B (A x)`, `s = alpha/r`: A starts random, B at zero; only they are trained."""

    method = "lora"

    r: int = 8
    """Rank of each update: A is (r, in), B is (out, r)."""
    alpha: float = 16.0
    """The update is scaled by alpha/r."""
    dropout: float = 0.0
    """Dropout on the side path's input while training."""
    targets: tuple[str, ...] = ("all-linear",)
    """Modules to adapt: a preset (all-linear, attention, mlp), a name, a glob on the dotted
    name, or parts of a fused projection as in `c_attn:q,v`."""
    exclude: tuple[str, ...] = ()
    """Modules left out of the targets, in the same form."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Another rank for the modules that match a pattern; the last match wins."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Another alpha for the modules that match a pattern; the last match wins."""
    layers: tuple[int, ...] | None = None
    """Adapt only these blocks, counted from 0; all when not given."""
    bias: Literal["none", "all", "lora"] = "none"
    """Train no bias, every bias of the base, or those of the adapted layers."""
    train_whole: tuple[str, ...] = ()
    """Modules trained whole in a copy of the adapter's own, such as a classification head."""
    token_rows: tuple[int, ...] = ()
    """Ids of tokens whose rows of the embedding and of the head are trained, in the place of the
    base's. The base may lack rows for the last of them; `--new-tokens` finds ids by itself."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """The update's factor: the paper's, or the rank-stabilised one (Kalajdzievski, 2023)."""
    start: Literal["kaiming", "gaussian", "loftq", "pissa", "olora"] = "kaiming"
    """How A starts: uniform as in the original code, or Gaussian as in the paper. `loftq`: over a
    quantised base, A and B start at what quantising took away, so that the first outputs are
    nearer to the unquantised base's (Li et al., 2023); its weights are read for that. `pissa`: at
    the base matrix's r largest singular directions (Meng et al., 2024); `olora`: at the first r of
    its QR decomposition (Büyükakyüz, 2024). Those two leave the base as it is and train the
    difference to their start, which is saved as plain LoRA of rank 2r."""
    dtype: Dtype = "float32"
    """Data type of A and B; `base` takes that of the layer they stand beside."""
    dora: bool = False
    """Train the norm of each of the matrix's rows beside its direction (Liu et al., 2024); for
    whole linear layers. Its norms are taken in each forward pass: merge it to serve it fast."""
    b_rate: float = 1.0
    """B's learning rate as a multiple of A's (LoRA+, Hayou et al., 2024: 16); embeddings keep 1.
    Heeded by `sidepath train`; other trainers need `make_optimizer`'s parameter groups."""

    def __post_init__(self) -> None:
        check(self)
        ranks, alphas = self.rank_pattern.values(), self.alpha_pattern.values()
        # Saved at twice the rank, with an alpha up to twice as large.
        halves = 2 if self.start in REBASED else 1
        largest, highest = MAX_RANK // halves, MAX_ALPHA / halves
        rules = {
            "r": 1 <= self.r <= largest,
            "alpha": 0 < self.alpha <= highest,
            "dropout": 0 <= self.dropout < 1,
            "targets": len(self.targets) > 0,
            "rank_pattern": all(1 <= rank <= largest for rank in ranks),
            "alpha_pattern": all(0 < alpha <= highest for alpha in alphas),
            "layers": self.layers is None or (bool(self.layers) and min(self.layers) >= 0),
            "dora": not self.dora or self.start in ("kaiming", "gaussian"),
            "b_rate": 0 < self.b_rate <= 1e6,
            "token_rows": _are_ids(self.token_rows),
        }
        require(self, rules)

    def selection(self) -> Selection:
        patterns = (*self.rank_pattern, *self.alpha_pattern)
        return Selection(
            self.targets,
            self.exclude,
            self.layers,
            self.bias,
            self.train_whole,
            patterns,
            tokens=bool(self.token_rows),
        )

    def rank_of(self, path: str) -> int:
        """The rank at a module's path, rank patterns considered."""
        if not self.rank_pattern:
            return self.r
        matches = [rank for key, rank in self.rank_pattern.items() if name_matches(key, path)]
        return matches[-1] if matches else self.r

    def alpha_of(self, path: str) -> float:
        """Alpha at a module's path, alpha patterns considered."""
        if not self.alpha_pattern:
            return self.alpha
        matches = [alpha for key, alpha in self.alpha_pattern.items() if name_matches(key, path)]
        return matches[-1] if matches else self.alpha

    def scaling_of(self, path: str) -> float:
        """The factor `s` at a module's path."""
        return self._factor(self.rank_of(path), self.alpha_of(path))

    def _factor(self, rank: int, alpha: float) -> float:
        return alpha / rank if self.scaling == "alpha/r" else alpha / math.sqrt(rank)

    def dense_delta(self, site: Site, view: DenseView, tensors: Saved = None) -> Delta:
        rank, alpha = self.rank_of(site.path), self.alpha_of(site.path)
        settings = AtPlace(
            r=rank,
            alpha=alpha,
            scaling=self._factor(rank, alpha),
            dropout=self.dropout,
            with_bias=self.bias != "none" and view.bias is not None,
            dtype=dtype_of(self.dtype, view),
        )
        if self.start == "pissa" or self.start == "olora":
            return Rebased(view, settings, self.start, site.parts, tensors)
        delta: Dora | LowRank
        if self.dora:
            delta = Dora(view, settings, tensors)
        else:
            delta = LowRank(view, settings, site.parts, tensors)
        if tensors is None:
            # What quantising took away is known where the unquantised weights are (`start_at_`).
            delta.start_("gaussian" if self.start == "gaussian" else "kaiming")
        return delta

    def tokens_delta(self, site: Site, view: View, tensors: Saved = None) -> Delta:
        rows = None if tensors is None else tensors.get("rows")
        dtype = dtype_of(self.dtype, view)
        return TokenRows(view, self.token_rows, dtype, rows, fresh=tensors is None)

    def deltas(
        self, sites: Iterable[Site], views: Views, tensors: AllSaved = None
    ) -> dict[str, Delta]:
        """See `Method.deltas`. Errors: `UnsupportedModule` with every site DoRA cannot take."""
        sites = tuple(sites)
        if self.dora:
            refuse(sites, views)
        return super().deltas(sites, views, tensors)

    def saved(self) -> LoRA:
        """A start away from zero is saved as plain LoRA of twice the rank and the same factor."""
        if self.start not in REBASED:
            return self
        # alpha/r keeps its value at 2r if alpha doubles, alpha/sqrt(r) if it grows by sqrt(2).
        times = 2.0 if self.scaling == "alpha/r" else math.sqrt(2.0)
        return dataclasses.replace(
            self,
            r=2 * self.r,
            alpha=times * self.alpha,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: times * alpha for key, alpha in self.alpha_pattern.items()},
            start="kaiming",
        )

    def rate_of(self, delta: Delta, local: str) -> float:
        """`b_rate` for the B of a layer; an embedding's B is the factor that starts random."""
        low_rank = isinstance(delta, Dora) or (
            isinstance(delta, LowRank) and delta.kind != "embedding"
        )
        return self.b_rate if low_rank and local == "B" else 1.0


def _are_ids(rows: tuple[int, ...]) -> bool:
    within = all(0 <= one <= LARGEST_ID for one in rows)
    return within and len({*rows}) == len(rows) <= MOST_TOKENS


def name_matches(pattern: str, path: str) -> bool:
    """Whether a target pattern names the module at `path`.

    A pattern without a dot is held against the path's last part; one with a dot against the
    whole path or any tail of it that starts at a dot. `*`, `?` and `[...]` are globs.
    """
    if "." not in pattern:
        return fnmatchcase(path.rpartition(".")[2], pattern)
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def by_path(values: Mapping[str, T], usual: T | None = None) -> dict[str, T]:
    """Patterns that give each of these module paths its value, for a table whose last match wins.

    Paths with the `usual` value need no pattern, unless another path's would catch them.
    """
    needed = [path for path, value in values.items() if value != usual]
    caught = [
        path
        for path, value in values.items()
        if value == usual and any(name_matches(glob.escape(other), path) for other in needed)
    ]
    # A path comes after every path that is a tail of it.
    ordered = sorted([*needed, *caught], key=lambda path: path.count("."))
    return {glob.escape(path): values[path] for path in ordered}
