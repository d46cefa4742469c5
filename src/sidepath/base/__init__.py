"""The embedded base: a small pre-trained decoder with its own tokenizer (floor 0).

A transformers folder, made by `scripts/pretrain_base.py`; its card is `README.md` beside it.
"""

from __future__ import annotations

from pathlib import Path


def embedded_base() -> Path:
    """The folder of the base in the package; the default of `--base` everywhere."""
    return Path(__file__).resolve().parent
