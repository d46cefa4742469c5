"""Methods without a side path: everything, the head alone, or the biases alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sidepath.config import check, require
from sidepath.methods.base import HEAD, Method, Selection


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Every parameter of the base, or of its last blocks, is trained, in a copy of its own.

    The base stays as it is, as with every other method, so a model takes its memory twice.
    """

    method = "full"

    top: int | None = None
    """Train only the last so many blocks (FT-Top2 of the LoRA paper, section 5.1: 2); all of the
    model when not given."""
    train_whole: tuple[str, ...] = ()
    """Modules trained whole beside the blocks, such as a classification head."""

    def __post_init__(self) -> None:
        check(self)
        require(self, {"top": self.top is None or self.top > 0})

    def selection(self) -> Selection:
        blocks = (None, None) if self.top is None else (-self.top, None)
        return Selection((), own=True, blocks=blocks, train_whole=self.train_whole)


@dataclass(frozen=True)
class LinearProbe(Method):
    """The model's head alone is trained: feature-based transfer over a frozen body.

    The body is a fixed function of a row: its dropout is off in training, and each row goes through
    it once in a run. What it gives is kept on disk meanwhile, not in memory.
    """

    method = "probe"

    train_whole: tuple[str, ...] = (HEAD,)
    """Modules that are trained; `head` stands for whatever heads the model has."""

    def __post_init__(self) -> None:
        check(self)
        require(self, {"train_whole": bool(self.train_whole)})

    def selection(self) -> Selection:
        return Selection((), train_whole=self.train_whole)

    def with_heads(self, heads: Sequence[str]) -> Method:
        return self if HEAD in self.train_whole else super().with_heads(heads)


@dataclass(frozen=True)
class BitFit(Method):
    """Every bias of the base is trained and nothing else (Ben Zaken et al., 2021)."""

    method = "bitfit"

    train_whole: tuple[str, ...] = ()
    """Modules trained whole beside the biases, such as a classification head."""

    def __post_init__(self) -> None:
        check(self)

    def selection(self) -> Selection:
        return Selection((), bias="all", train_whole=self.train_whole)
