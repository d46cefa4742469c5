"""Counts of trained parameters as papers print them, and what makes them here.

Each row is a fact: what a paper prints, the number behind it, and whether printing that number
gives what the paper has (`EXACT` rounded, `TRUNC` cut off, `NEAR` neither but within 2 %, `FAIL`).
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from typing import Any

EXACT, TRUNC, NEAR, FAIL = "EXACT", "TRUNC", "NEAR", "FAIL"
UNITS = {"": 1, "M": 10**6, "B": 10**9, "MiB": 2**20}
Part = tuple[str, dict[str, Any]]
"""A method's name and its settings."""


@dataclass(frozen=True)
class Row:
    """One printed count."""

    table: str
    model: str
    label: str
    printed: str
    """As the paper prints it, with its unit: `4.7 M`, `0.84 % of all`."""
    count: int
    """Parameters, bytes for MiB, millionths of a percent for %."""
    status: str
    parts: tuple[Part, ...]
    """The adapters whose parameters these are, together."""
    base: str
    """Which of `tests.store.bases` it is counted on."""

    @property
    def unit(self) -> str:
        """`M`, `B`, `MiB`, `%`, `% of all`, `% of blocks`, or nothing."""
        return self.printed.partition(" ")[2]

    def found_status(self) -> str:
        """What printing `count` comes to."""
        scale = 10**6 if "%" in self.unit else UNITS[self.unit]
        value, text = Decimal(self.count) / scale, Decimal(self.printed.partition(" ")[0])
        for status, rounding in ((EXACT, ROUND_HALF_UP), (TRUNC, ROUND_DOWN)):
            if value.quantize(text, rounding=rounding) == text:
                return status
        return NEAR if abs(value - text) <= text / 50 else FAIL

    def __str__(self) -> str:
        return f"{self.table} {self.model} {self.label}"


def row(
    table: str,
    model: str,
    label: str,
    printed: str,
    count: int,
    status: str,
    *parts: Part,
    base: str = "",
) -> Row:
    """A row; counted on the base of its model's name when no other is given."""
    return Row(table, model, label, printed, count, status, parts, base or model)


BITFIT: Part = ("bitfit", {})
FULL: Part = ("full", {})


def full(top: int) -> Part:
    """The last blocks, fine-tuned."""
    return "full", {"top": top}


def whole(*modules: str) -> Part:
    """These modules alone, trained whole."""
    return "probe", {"train_whole": modules}


def lora(r: int, *targets: str, heads: tuple[str, ...] = (), **more: Any) -> Part:
    """LoRA on the targets; `heads` are trained whole."""
    return "lora", {"r": r, "targets": targets, "train_whole": heads, **more}


def gpt(r: int, matrices: str) -> Part:
    """LoRA on matrices of GPT-2's attention: some of q, k, v (one fused projection) and o."""
    fused = ",".join(name for name in matrices if name != "o")
    return lora(r, f"c_attn:{fused}", *(["attn.c_proj"] if "o" in matrices else []))


def roberta(r: int, *heads: str) -> Part:
    """LoRA on queries and values of BERT's kin."""
    return lora(r, "query", "value", heads=heads)


def deberta(r: int, *heads: str) -> Part:
    """LoRA on queries and values of DeBERTa-v2."""
    return lora(r, "query_proj", "value_proj", heads=heads)


def adapters(kind: str, size: int, *heads: str, drop: int = 0) -> Part:
    """Bottleneck adapters of one of the papers' kinds."""
    return "bottleneck", {"kind": kind, "size": size, "drop": drop, "train_whole": heads}


def prompt(tokens: int) -> Part:
    """Trained embeddings: `d` numbers a token (`PreEmbed`: l_p in front and l_i behind)."""
    return "prompt", {"tokens": tokens}


def prefix(tokens: int) -> Part:
    """Trained keys and values of each layer, plain as they are saved."""
    return "prefix", {"tokens": tokens, "hidden": None}


def prefix_layer(tokens: int) -> Part:
    """The LoRA paper's `PreLayer`: trained activations `d` wide in each layer."""
    return "prompt", {"tokens": tokens, "every_layer": True}
