"""The verb inspect: what each update of an adapter is made of (floor 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidepath.analyse import Factors, factors_of, spectrum
from sidepath.analyse.advise import energy_of_kinds
from sidepath.analyse.report import report, said_of_ranks
from sidepath.analyse.subspace import expected_at_random, grassmann_distance, grids
from sidepath.analyse.tokens import rows_of_tokens
from sidepath.cli.bases import adapter_place, base_folder
from sidepath.cli.beside_base import held_against, norms_of, require_base
from sidepath.cli.choosing import advised, truncated
from sidepath.cli.inspect_run import InspectRun
from sidepath.cli.origins import audit_of, origins
from sidepath.cli.output import Report, Table, cell, finite, note
from sidepath.cli.surface import Call
from sidepath.errors import ConfigError, StoreError
from sidepath.store.file import publish_file
from sidepath.store.hub import name_of

LARGEST_SHOWN = 4
"""Singular values a row of the table shows; the document holds all."""


def inspect(call: Call) -> Report:
    """Spectra and energies of an adapter, beside its base where that is given; what two adapters
    share; the adapter at lower rank; which rank would have been enough.
    """
    run = call.settings.build("inspect", InspectRun)
    _require_sense(run, call.places)
    place = adapter_place(call.places[0])
    found = factors_of(place, run.alpha)
    if len(call.places) == 2:
        result = _compared(found, place, adapter_place(call.places[1]), run)
    else:
        result = _looked_at(found, place, run)
    if run.html is None:
        return result
    page = report(finite(result.document), audit_of(result.document))
    with publish_file(run.html, overwrite=True) as file:
        file.write_text(page, encoding="utf-8")
    return Report({**result.document, "html": run.html}, [*result.parts, f"report in {run.html}"])


def _require_sense(run: InspectRun, places: Sequence[str]) -> None:
    """Raise one `ConfigError` with everything that does not go together."""
    two, changed = len(places) == 2, run.advise or run.truncate is not None
    rules = {
        "--base goes with one adapter; two are compared with each other": two and run.base,
        "--truncate and --advise go with one adapter": two and changed,
        "--advise needs --data to measure the metric on": run.advise and run.data is None,
        "--truncate needs --output, where the smaller adapter is written": run.truncate
        and run.output is None,
        "--truncate and --advise each choose a rank: give one": run.advise and run.truncate,
        "--data is read for --truncate and --advise alone": run.data and not changed,
        "--output is written by --truncate and --advise alone": run.output and not changed,
        "--merged goes with one adapter": two and run.merged,
        "--html: its folder does not exist": run.html and not Path(run.html).parent.is_dir(),
    }
    faults = [said for said, broken in rules.items() if broken]
    if faults:
        raise ConfigError("this cannot be inspected so", faults=faults)


def _looked_at(found: Mapping[str, Factors], place: Path, run: InspectRun) -> Report:
    base = None if run.base is None else base_folder(run.base)
    if base is not None:
        require_base(place, base)
    norms = {} if base is None else norms_of(base, found)
    layers = [_layer(name, factors, norms.get(name)) for name, factors in found.items()]
    document: dict[str, Any] = {
        "adapter": name_of(place),
        "facts": _facts(found),
        "layers": layers,
        "energy": energy_of_kinds(found),
        "tokens": rows_of_tokens(place),
        **origins(place, run.merged),
    }
    parts: list[Table | str] = [_layer_table(layers), said_of_ranks(layers), *_warnings(layers)]
    parts += _token_table(document["tokens"])
    if base is not None:
        document["against"] = held_against(base, found, run.widest)
        parts += [_against_table(document["against"])] if document["against"] else []
    if run.truncate is not None:
        document["truncated"], said = truncated(found, place, run)
        parts += said
    if run.advise:
        document["advice"], said = advised(found, place, run)
        parts += said
    return Report(document, parts)


def _facts(found: Mapping[str, Factors]) -> dict[str, str]:
    ranks = sorted({factors.r for factors in found.values()})
    scalings = sorted({factors.scaling for factors in found.values()})
    dtypes = sorted({str(factors.A_RI.dtype).removeprefix("torch.") for factors in found.values()})
    numbers = sum(factors.A_RI.numel() + factors.B_Or.numel() for factors in found.values())
    return {
        "updates": f"{len(found):,}",
        "rank": " to ".join(map(str, [ranks[0], ranks[-1]][: len(ranks)])),
        "scaling": " to ".join(f"{s:.4g}" for s in [scalings[0], scalings[-1]][: len(scalings)]),
        "stored in": ", ".join(dtypes),
        "numbers": f"{numbers:,}",
    }


def _layer(name: str, factors: Factors, weight_norm: float | None) -> dict[str, Any]:
    result = spectrum(factors)
    return {
        "name": name,
        "r": factors.r,
        **result.as_dict(),
        "relative_norm": result.norm / weight_norm if weight_norm else None,
        "scaling": factors.scaling,
    }


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["layer", "r", "largest singular values", "effective rank", "rank at 99 %", "norm",
               "relative norm"]  # fmt: skip
    rows = [
        [
            layer["name"],
            layer["r"],
            " ".join(cell(value) for value in layer["singular_values"][:LARGEST_SHOWN]),
            layer["effective_rank"],
            layer["rank_at_energy"]["0.99"],
            layer["norm"],
            layer["relative_norm"],
        ]
        for layer in layers
    ]
    return Table("", columns, rows)


def _token_table(rows: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    columns = ["token", "id", "module", "norm"]
    cells = [[row[name] for name in columns] for row in rows]
    return [Table("rows of tokens", columns, cells)] if rows else []


def _warnings(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Updates that do nothing, and those far above the others."""
    dead = [layer["name"] for layer in layers if layer["norm"] == 0]
    ordered = sorted(layer["norm"] for layer in layers)
    usual = ordered[len(ordered) // 2]
    large = [layer["name"] for layer in layers if usual > 0 and layer["norm"] > 10 * usual]
    told = [("change nothing, their norm is 0", dead), ("are ten times the median's norm", large)]
    return [
        f"{len(names)} of {len(layers)} updates {what}: {', '.join(names[:4])}"
        + (", ..." if len(names) > 4 else "")
        for what, names in told
        if names
    ]


def _against_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = ["name", "weight_norm", "update_norm", "projected", "projected_on_own",
             "projected_on_random", "amplification", "in_top_inputs"]  # fmt: skip
    columns = ["layer", "|W|", "|dW|", "|U'WV|", "of W's own", "of random", "amplification",
               "in W's top tenth", "intruders"]  # fmt: skip
    cells = [[*(row[name] for name in names), len(row["intruders"])] for row in rows]
    return Table("against the base", columns, cells)


def _compared(
    found: Mapping[str, Factors], place: Path, other_place: Path, run: InspectRun
) -> Report:
    other = factors_of(other_place, run.alpha)
    shared = [name for name in found if name in other]
    if not shared:
        raise StoreError(
            "the two adapters update no layer in common",
            found=f"{', '.join(list(found)[:3])} and {', '.join(list(other)[:3])}",
        )
    for name, alone in ((place, found), (other_place, other)):
        if len(alone) > len(shared):
            note(f"{name}: {len(alone) - len(shared)} updates have no counterpart; left out")
    pairs = [_pair(name, found[name], other[name]) for name in shared]
    columns = ["layer", "A, first", "A, whole", "random", "distance", "B, first", "dW, first input",
               "dW, first output"]  # fmt: skip
    names = ("name", "first", "whole", "expected", "distance")
    firsts = ("B", "inputs", "outputs")
    rows = [
        [*(pair[key] for key in names), *(_first(pair["grids"][key]) for key in firsts)]
        for pair in pairs
    ]
    equal = set(found) == set(other) and all(pair["equal"] for pair in pairs)
    said = ["the two adapters hold the same updates"] if equal else []
    document = {
        "adapter": name_of(place),
        "other": name_of(other_place),
        "facts": _facts(found),
        "similarity": pairs,
        "equal": equal,
        **origins(place),
    }
    return Report(document, [Table("phi, 0 to 1", columns, rows), *said])


def _first(phi: Sequence[Sequence[float]]) -> float | None:
    return phi[0][0] if phi else None


def _pair(name: str, one: Factors, other: Factors) -> dict[str, Any]:
    found = grids(one, other)
    phi = found.pop("A")
    i, j = len(phi), len(phi[0])
    return {
        "name": name,
        "phi": phi,
        "first": phi[0][0],
        "whole": phi[-1][-1],
        "expected": expected_at_random(i, j, one.shape[1]),
        "distance": grassmann_distance(phi[-1][-1], i, j),
        "grids": found,
        "equal": one.scaling == other.scaling
        and one.sizes == other.sizes
        and one.A_RI.equal(other.A_RI)
        and one.B_Or.equal(other.B_Or),
    }
