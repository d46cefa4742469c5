"""Rows of tokens as PEFT has them: `trainable_token_indices`, and a tensor at each table (floor 4).

PEFT ties the rows of tied tables by the base's config; in the file they stand once. Ids beyond the
base's table need it to be lengthened first, which PEFT leaves to its user.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sidepath.methods.base import Site
from sidepath.methods.tokens import LARGEST_ID, MOST_TOKENS

INDICES = "trainable_token_indices"
"""PEFT's field for the tokens whose rows are trained."""


def ids_of(value: Any) -> tuple[int, ...]:
    """The field's ids, in the file's order: one list for the embedding, or one for each table.

    Errors: `ValueError` for anything else, and for tables with other tokens than another.
    """
    if value is None:
        return ()
    lists = list(value.values()) if isinstance(value, dict) else [value]
    first = lists[0] if lists else []
    if not isinstance(first, list) or len(first) > MOST_TOKENS:
        raise ValueError(f"expected a list of at most {MOST_TOKENS:,} token ids")
    if not all(type(one) is int and 0 <= one <= LARGEST_ID for one in first):
        raise ValueError(f"holds what is no token id, a whole number up to {LARGEST_ID}")
    if len({*first}) < len(first):
        raise ValueError("names a token twice")
    if any(one != first for one in lists):
        raise ValueError("other tokens for one table than for another are not supported")
    return tuple(first)


def indices_for(
    sites: Mapping[str, Site], modules: Mapping[str, nn.Module], ids: Sequence[int]
) -> dict[str, Any]:
    """The field for these sites; nothing where no rows stand."""
    tables: dict[Tensor | None, str] = {}
    for path, site in sites.items():
        if site.kind == "tokens":
            tables.setdefault(table_at(modules, path), path)
    return {INDICES: {path: list(ids) for path in tables.values()}} if tables else {}


def table_at(modules: Mapping[str, nn.Module], path: str) -> Tensor | None:
    """The parameter that a module's rows are in, if there is such a module."""
    return modules[path]._parameters.get("weight") if path in modules else None


def sites_at(path: str, modules: Mapping[str, nn.Module]) -> dict[str, Site]:
    """Sites at a module and at the others that hold its table."""
    table = table_at(modules, path)
    others = [] if table is None else [one for one in modules if table_at(modules, one) is table]
    return {one: Site(one, "tokens", pattern="tokens") for one in (path, *others)}


def misfits(
    ids: Sequence[int],
    sites: Iterable[Site],
    modules: Mapping[str, nn.Module],
    places: Sequence[str],
) -> list[str]:
    """Why the ids of a PEFT folder do not go with the rows that its file holds.

    `places`: the modules with tables of tokens. Rows beyond the base's stand in all of them.
    """
    held = [site.path for site in sites if site.kind == "tokens"]
    if bool(held) != bool(ids):
        return [f"{INDICES}: {len(ids)} tokens, and rows at {len(held)} modules"]
    sizes = [len(table) for path in held if (table := table_at(modules, path)) is not None]
    lacking = [path for path in places if path not in held]
    if ids and sizes and max(ids) >= min(sizes) and lacking:
        return [f"{path}: no row for token {max(ids)}, which is added" for path in lacking]
    return []
