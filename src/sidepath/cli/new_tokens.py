"""Tokens that a run brings to its base: which there are, and whether the data hold them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sidepath.cli.output import note
from sidepath.data.dataset import Data
from sidepath.errors import DataError
from sidepath.injection.places import token_tables
from sidepath.store.new_tokens import unknown_to


def rows_of(model: nn.Module) -> int:
    """How many tokens a model has rows for; 0 for one that takes none."""
    places = token_tables(model)
    tables = (model.get_parameter(f"{path}.weight") for path in places)
    return min((len(table) for table in tables), default=0)


def all_new(named: Mapping[str, int], data: Data, model: nn.Module) -> dict[str, int]:
    """The tokens that the user named, and, where the data hold any, those that were added to the
    tokenizer and that the base has no row for.
    """
    rows = rows_of(model)
    unknown = unknown_to(data.tokenizer, rows) if 0 < rows <= data.largest_id else {}
    more = [text for text in unknown if text not in named]
    if more:
        note(
            f"{len(more)} tokens of the tokenizer are new to the base, which has {rows:,} rows: "
            f"{', '.join(more[:5])}"
        )
    return {**named, **unknown}


def tell_tokens(tokens: Mapping[str, int], data: Data) -> None:
    """In how many rows of the data each new token stands.

    Errors: `DataError` when none of them stands in any.
    """
    if not tokens:
        return
    held = dict.fromkeys(tokens, 0)
    for example in data.examples:
        ids = set(example.ids_T.tolist())
        for text, i in tokens.items():
            held[text] += i in ids
    if not any(held.values()):
        raise DataError(
            "no row of the data holds any of the new tokens: nothing would train them",
            where=data.name,
            found=", ".join(list(tokens)[:8]),
            hint="write them into the texts as they are named",
        )
    told = ", ".join(f"{text} in {count:,}" for text, count in list(held.items())[:8])
    more = f", and {len(held) - 8} more" if len(held) > 8 else ""
    note(f"new tokens   rows that hold them, of {len(data):,}: {told}{more}")
    never = [text for text, count in held.items() if not count]
    if never:
        note(f"note: {len(never)} new tokens stand in no row, and are not learned: {never[0]}")
