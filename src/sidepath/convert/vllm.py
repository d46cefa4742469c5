"""What vLLM accepts of an adapter, and an adapter made so (floor 5).

Facts from vLLM's sources (`lora/peft_helper.py`, `lora/lora_model.py`, `config/lora.py`): it reads
PEFT's folder; of the settings r, lora_alpha, use_rslora, use_dora, bias and modules_to_save count.
rank_pattern and alpha_pattern are passed over: every module is scaled by the one lora_alpha / r.
`--max-lora-rank` is one of a list, and no adapter's rank may be above it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from sidepath.convert.folding import one_rank, one_scaling
from sidepath.convert.portable import Base, Options, Portable, Update, portable_of
from sidepath.core.views import view_of
from sidepath.errors import StoreError
from sidepath.injection.architecture import modules_of
from sidepath.store.peft_format import PREFIX

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` can be."""
EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules with rows for tokens whose updates vLLM has layers for, by the last part of the name."""
LARGEST_VOCABULARY = 257_024
"""Rows of a head that its kernel for logits reaches."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether vLLM takes an adapter as it is."""

    faults: tuple[str, ...]
    """What it refuses, or would compute wrongly, each with what to do."""
    max_lora_rank: int | None
    """The least `--max-lora-rank` that the adapter needs; None when none is large enough."""
    mendable: bool
    """Whether writing it for vLLM mends all of it."""


def judged(portable: Portable, base: Base | None) -> Verdict:
    """What vLLM makes of an adapter's folder; with the base, of each module it names."""
    updates = portable.updates()
    ranks = {one.r for one in updates.values()}
    fixable = _scales(portable, updates)
    hard = [*_settings(portable), *_kinds(updates, base)]
    need = next((r for r in RANKS if r >= max(ranks)), None)
    if need is None:
        hard.append(
            f"rank {max(ranks)}: the largest --max-lora-rank is {RANKS[-1]}; make it smaller: "
            f"sidepath inspect ADAPTER --truncate r={RANKS[-1]}"
        )
    return Verdict((*fixable, *hard), need, not hard)


def _scales(portable: Portable, updates: Mapping[str, Update]) -> list[str]:
    """Where vLLM's one `lora_alpha / r` is not a module's own scale."""
    settings = portable.settings
    one = settings.alpha / (math.sqrt(settings.r) if settings.rslora else settings.r)
    other = [path for path, update in updates.items() if update.scaling != one]
    faults = []
    if other:
        faults.append(
            f"{len(other)} of {len(updates)} modules have a scale of their own (rank_pattern, "
            f"alpha_pattern), which vLLM passes over and computes wrongly: convert it with "
            f"--to peft --for vllm ({', '.join(other[:3])})"
        )
    largest = max(update.r for update in updates.values())
    if largest > settings.r:
        faults.append(
            f"rank_pattern has rank {largest}, above r = {settings.r}, which is all that vLLM "
            "holds against --max-lora-rank: convert it with --to peft --for vllm"
        )
    return faults


def _settings(portable: Portable) -> list[str]:
    settings = portable.settings
    faults = []
    if settings.dora:
        faults.append("DoRA is not supported: merge the adapter (sidepath merge)")
    if settings.modules_to_save:
        faults.append(
            f"modules_to_save ({', '.join(settings.modules_to_save)}) has to be empty: merge the "
            "adapter, or train it without modules of the base's own"
        )
    biases = [key for key in portable.others() if key.endswith(".bias")]
    if settings.bias != "none" or biases:
        faults.append(
            f"bias ({settings.bias}, {len(biases)} tensors) is not supported: merge the adapter"
        )
    others = [key.removeprefix(PREFIX) for key in portable.others() if key not in biases]
    if others and not settings.modules_to_save:
        faults.append(f"tensors that are no update: {', '.join(others[:3])}")
    return faults


def _kinds(updates: Mapping[str, Update], base: Base | None) -> list[str]:
    modules = {} if base is None else dict(modules_of(base.model))
    faults = []
    for path, one in updates.items():
        name = path.rpartition(".")[2]
        if one.A.dim() > 2:
            faults.append(f"{path}: convolutions have no LoRA layer in vLLM")
        if one.embedding and name not in EMBEDDINGS:
            faults.append(f"{path}: of embeddings, vLLM adapts {' and '.join(EMBEDDINGS)} only")
        if name == EMBEDDINGS[1] and len(one.B) > LARGEST_VOCABULARY:
            faults.append(f"{path}: {len(one.B)} rows, at most {LARGEST_VOCABULARY}")
        if modules and path not in modules:
            faults.append(f"{path}: the base has no such module")
        elif modules and (view := view_of(modules[path])) and view.kind == "conv1d_transposed":
            rows, columns = view.shape
            if one.B.shape[0] != rows or one.A.shape[1] != columns:
                faults.append(f"{path}: shapes do not fit the base's {rows} x {columns}")
    return faults


def fitted(portable: Portable) -> tuple[Portable, list[str]]:
    """The adapter with one rank and one scale for all modules, and notes.

    Ranks are padded with zeros (exact); see `folding` for scales. Its manifest no longer tells
    what is in the folder, so that it has none.

    Errors: `StoreError` with everything that writing it anew cannot mend.
    """
    verdict = judged(portable, None)
    if not verdict.mendable:
        raise StoreError(
            "vLLM does not take this adapter; nothing was written", faults=verdict.faults
        )
    note = f"start vLLM with --max-lora-rank {verdict.max_lora_rank} or more"
    if not verdict.faults:
        return portable, [note]
    folded = one_scaling(portable.updates())
    made = portable_of(
        one_rank(folded.updates), options=Options(), dropout=portable.settings.dropout
    )
    kept = {
        name: portable.values[name]
        for name in ("task_type", "base_model_name_or_path", "target_modules", "fan_in_fan_out")
        if name in portable.values
    }
    values = {**made.values, **kept}
    return Portable(made.tensors, values, notes=portable.notes), [*folded.notes(), note]
