"""The model card of an adapter's folder: a `README.md` for people and for the hub (floor 4).

Its front matter holds fields that the hub knows: huggingface_hub's `ModelCardData`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sidepath.config import as_dict
from sidepath.store.hub import PREFIX, is_name
from sidepath.store.manifest import Manifest

CARD = "README.md"
LICENCE, PARITY, METRICS = "licence", "parity", "metrics"
"""Fields of an adapter's record that the card shows in a place of their own."""
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
}
_HOW_FAR = {
    "max_abs": "largest difference of two outputs",
    "mean_abs": "mean difference of two outputs",
    "top1": "share of positions with the same first choice",
    "kl": "mean KL divergence, nats",
    "positions": "positions compared",
}


def model_card(manifest: Manifest, name: str, trainable: int, place: str = "<this folder>") -> str:
    """What the adapter is: its base, settings, metrics, record, and how to load it from `place`."""
    base = _base(manifest)
    record = {
        key: value
        for key, value in manifest.record.items()
        if key not in (LICENCE, PARITY, METRICS)
    }
    lines = [
        *_front(manifest), "", f"# {name}", "",
        f"An adapter ({manifest.config.method}, {trainable:,} parameters) for {base}, "
        f"fingerprint `{manifest.base.id}`.", "",
        *_table("base", _base_rows(manifest)),
        *_table("setting", as_dict(manifest.config).items()),
        *_table("metric", _items(manifest.record.get(METRICS))),
        *_parity(manifest.record.get(PARITY)),
        *_table("record", record.items()),
        "```python", "import sidepath", f'sidepath.load(model, "{place}", name="{name}")', "```",
        "", "The folder's format is PEFT's; `sidepath.json` lists every file's SHA-256.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _front(manifest: Manifest) -> list[str]:
    record = manifest.record
    lines = ["---"]
    if _on_hub(manifest):  # a folder's path is no model id
        lines += [f"base_model: {manifest.base_name}", "base_model_relation: adapter"]
    lines.append("library_name: peft")
    if isinstance(record.get(LICENCE), str):
        lines.append(f"license: {record[LICENCE]}")
    task = next((t for end, t in _PIPELINES.items() if manifest.model_class.endswith(end)), None)
    if task is not None:
        lines.append(f"pipeline_tag: {task}")
    names = _data_sets(record.get("data"))
    lines += ["datasets:", *(f"- {name}" for name in names)] if names else []
    return [*lines, "tags:", f"- {manifest.config.method}", "- sidepath", "---"]


def _data_sets(data: Any) -> list[str]:
    """The hub's data sets among those that the record names."""
    named = str(data.get("name", "")).split(", ") if isinstance(data, Mapping) else []
    found = [name.removeprefix(PREFIX) for name in named if name.startswith(PREFIX)]
    return list(dict.fromkeys(name.partition("@")[0].partition(",")[0] for name in found))


def _on_hub(manifest: Manifest) -> bool:
    """Whether the base's name is one of the hub's. transformers tells no commit with it; then
    it is if it looks like one and no folder here is called so.
    """
    name = manifest.base_name
    if name is None or manifest.base_revision is not None:
        return name is not None
    return is_name(name) and not Path(name).exists()


def _base(manifest: Manifest) -> str:
    name = manifest.base_name
    if name is None:
        return "an unnamed base"
    return name if _on_hub(manifest) else Path(name).name


def _base_rows(manifest: Manifest) -> list[tuple[str, Any]]:
    rows = [
        ("name", _base(manifest)),
        ("revision", manifest.base_revision),
        ("class", manifest.model_class),
        ("classes", manifest.labels),
        ("fingerprint", manifest.base.id),
    ]
    return [(key, value) for key, value in rows if value is not None]


def _parity(values: Any) -> list[str]:
    found = dict(_items(values))
    rows = [(said, found[key]) for key, said in _HOW_FAR.items() if key in found]
    return _table("merged against un-merged", rows)


def _items(values: Any) -> Iterable[tuple[str, Any]]:
    return values.items() if isinstance(values, Mapping) else ()


def _table(head: str, rows: Iterable[tuple[str, Any]]) -> list[str]:
    body = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows]
    return [f"| {head} | value |", "|---|---|", *body, ""] if body else []


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
