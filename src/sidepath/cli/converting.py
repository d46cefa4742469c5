"""The verb convert: adapters in other tools' formats, both ways (floor 7)."""

from __future__ import annotations

import os
from pathlib import Path

from sidepath.cli.bases import base_folder, config_place
from sidepath.cli.convert_run import ConvertRun
from sidepath.cli.folders import require_output
from sidepath.cli.output import Report, Table
from sidepath.cli.surface import Call
from sidepath.convert.formats import FORMATS, read, replaceable
from sidepath.convert.formats import convert as convert_adapter
from sidepath.convert.portable import Base, Options, Portable
from sidepath.convert.vllm import judged
from sidepath.errors import ConfigError
from sidepath.store.configs import model_without_weights, quiet
from sidepath.store.file import refuse_existing


def convert(call: Call) -> Report:
    """An adapter in another format; or with --for alone, what stands in another tool's way."""
    run = call.settings.build("convert", ConvertRun)
    source = Path(call.places[0])
    output = Path(call.places[1]) if len(call.places) > 1 else None
    _check_places(run, output)
    quiet()
    options = Options(
        base=_base(run),
        alpha=run.alpha,
        fused={key: tuple(digit == "1" for digit in one) for key, one in run.fused.items()},
        component=run.component,
    )
    if run.to is None or output is None:
        return _checked(source, run, options)
    _require_free(output, run)
    found = convert_adapter(
        source,
        output,
        run.to,
        source_format=run.from_,
        options=options,
        for_vllm=run.for_ == "vllm",
        overwrite=run.overwrite,
    )
    layers = _layers(found.portable)
    document = {
        "output": str(output),
        "from": found.source,
        "to": run.to,
        "layers": layers,
        "base": None if found.portable.manifest is None else found.portable.manifest.base.id,
        "notes": list(found.notes),
    }
    told = f"{len(layers)} updates from {found.source} to {run.to} in {output}"
    return Report(document, [told, *found.notes])


def _check_places(run: ConvertRun, output: Path | None) -> None:
    if run.to is None and run.for_ is None:
        raise ConfigError(
            "nothing to convert to",
            expected=f"--to {'|'.join(FORMATS)}, or --for vllm to check alone",
        )
    if (run.to is None) != (output is None):
        raise ConfigError(
            "--to wants a place to write to" if output is None else "an output without --to",
            expected="sidepath convert IN OUT --to FORMAT, or sidepath convert IN --for vllm",
        )


def _require_free(output: Path, run: ConvertRun) -> None:
    if run.to is not None and FORMATS[run.to].folder:
        require_output(output, overwrite=run.overwrite, ours=replaceable)
    else:
        refuse_existing(output, run.overwrite)


def _base(run: ConvertRun) -> Base | None:
    if run.base is None:
        return None
    place = config_place(run.base)
    folder = None if os.path.isfile(place) else base_folder(run.base)
    return Base(model_without_weights(place, "auto"), folder)


def _layers(portable: Portable) -> list[dict[str, object]]:
    return [
        {"name": path, "r": one.r, "scaling": one.scaling}
        for path, one in portable.updates().items()
    ]


def _checked(source: Path, run: ConvertRun, options: Options) -> Report:
    """What vLLM makes of the adapter; nothing is written."""
    name, portable = read(source, options, run.from_)
    verdict = judged(portable, options.base)
    faults = list(verdict.faults)
    if name not in ("peft", "sidepath"):
        faults.append(f"the format {name} is not PEFT's: convert it with --to peft --for vllm")
    document = {
        "for": run.for_,
        "from": name,
        "accepted": not faults,
        "max_lora_rank": verdict.max_lora_rank,
        "faults": faults,
        "layers": _layers(portable),
    }
    need = f"start vLLM with --max-lora-rank {verdict.max_lora_rank} or more"
    if not faults:
        return Report(document, [f"vLLM takes it: {need}"])
    return Report(document, [Table("what vLLM would not take", ["fault"], [[f] for f in faults])])
