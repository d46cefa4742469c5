"""`serve --engine vllm`: the command that serves the same base and adapters on a fleet's engine.

Nothing is started: what vLLM would refuse or compute wrongly is found before it runs (floor 7).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from sidepath.cli.bases import config_place
from sidepath.cli.output import Report, Table
from sidepath.cli.serve_run import HOST, ServeRun
from sidepath.convert.formats import read
from sidepath.convert.portable import Base, Options
from sidepath.convert.vllm import Verdict, judged
from sidepath.errors import ConfigError, SidepathError, StoreError, in_one_line
from sidepath.store.configs import model_without_weights, quiet
from sidepath.store.fingerprint import fingerprint, same_base

_QUANTISED = {"none": (), "nf4": ("--quantization", "bitsandbytes")}


def vllm_command(run: ServeRun, base: str, folder: Path, adapters: Mapping[str, Path]) -> Report:
    """The command as people type it, and its words for scripts.

    Errors: `StoreError` that names every adapter that vLLM does not take, and why; `ConfigError`
    for a setting that vLLM has no form of.
    """
    if run.quantise not in _QUANTISED:
        raise ConfigError(
            "vLLM has no such base",
            where="quantise",
            found=run.quantise,
            expected=", ".join(_QUANTISED),
        )
    quiet()
    verdicts = _verdicts(folder, adapters, run.allow_other_base)
    words = [*_words(run, base, folder), *_of_adapters(run, adapters, verdicts)]
    rows = [[name, str(adapters[name]), verdicts[name].max_lora_rank] for name in adapters]
    document = {
        "command": words,
        "adapters": [
            {"name": name, "folder": where, "max_lora_rank": rank} for name, where, rank in rows
        ],
    }
    return Report(
        document, [shlex.join(words), Table("adapters", ["name", "folder", "rank"], rows)]
    )


def _words(run: ServeRun, base: str, folder: Path) -> list[str]:
    settings = {
        "--served-model-name": base,
        "--host": HOST,
        "--port": run.port,
        "--dtype": run.dtype,
        "--max-model-len": run.context,
        "--max-num-seqs": run.rows,
    }
    flags = [str(word) for pair in settings.items() for word in pair]
    return ["vllm", "serve", str(folder), *flags, *_QUANTISED[run.quantise]]


def _of_adapters(
    run: ServeRun, adapters: Mapping[str, Path], verdicts: Mapping[str, Verdict]
) -> list[str]:
    """What follows of the adapters: names, the rank they need, how many run and how many stay."""
    if not adapters:
        return []
    ranks = [one.max_lora_rank for one in verdicts.values() if one.max_lora_rank is not None]
    together = min(run.slots, len(adapters))
    return [
        "--enable-lora",
        "--max-lora-rank",
        str(max(ranks)),
        "--max-loras",
        str(together),
        "--max-cpu-loras",
        str(len(adapters)),
        "--lora-modules",
        *(f"{name}={folder}" for name, folder in adapters.items()),
    ]


def _verdicts(folder: Path, adapters: Mapping[str, Path], other: bool) -> dict[str, Verdict]:
    """What vLLM makes of each. Errors: one `StoreError` with every fault of every adapter."""
    base = Base(model_without_weights(config_place(str(folder)), "auto"), folder)
    identity = None if other or not adapters else fingerprint(folder)
    verdicts: dict[str, Verdict] = {}
    faults: list[str] = []
    for name, place in adapters.items():
        try:
            _, portable = read(place, Options())
            verdicts[name] = judged(portable, base)
        except SidepathError as error:
            faults.append(f"{place}: {in_one_line(error)}")
            continue
        faults += [f"{place}: {fault}" for fault in verdicts[name].faults]
        if identity is not None and portable.manifest is not None:
            faults += [f"{place}: {f}" for f in same_base(portable.manifest.base, identity)]
    if faults:
        bad = {fault.partition(":")[0] for fault in faults}
        raise StoreError(
            f"vLLM does not take {len(bad)} of {len(adapters)} adapters as they are",
            faults=faults,
            hint="sidepath convert IN OUT --to peft --for vllm writes ranks and scales as it wants "
            "them; what it has no form for is merged: sidepath merge",
        )
    return verdicts
