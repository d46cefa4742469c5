"""A small result of the demo, as `run_demo` returns it."""

from __future__ import annotations

from typing import Any


def result() -> dict[str, Any]:
    task = {
        "name": "sql",
        "description": "A question becomes SQL.",
        "metric": "exact_match",
        "audit": {"rows": 10, "supervised_share": 0.25, "end_token_share": 1.0, "truncated": 0},
        "base": 1.25,
        "lora": 96.5,
        "full": 97.0,
        "lora_trainable": 1234,
        "full_trainable": 99999,
        "lora_bytes": 5000,
        "full_bytes": 400000,
        "seconds": 3.21,
        "full_seconds": 6.54,
        "lora_losses": [3.0, 2.0, 1.0],
        "full_losses": [3.0, 1.0, 0.5],
        "samples": [{"prompt": "a < b & c", "completion": "x", "base": "<script>", "lora": "x"}],
    }
    parity = {"max_abs": 1e-6, "mean_abs": 1e-7, "top1": 1.0, "kl": 0.0}
    return {
        "tasks": [task],
        "parity": {**parity, "each": {"sql": parity}},
        "routed_equal": True,
        "routed": {
            "rows": 2,
            "adapters": ["sql", None],
            "tokens_equal": True,
            "max_abs": 1e-6,
            "texts": ["SELECT", "once"],
        },
        "seconds": 42.0,
        "report": "r.html",
    }
