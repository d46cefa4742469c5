"""How many tokens a model's config says there are, while adapters on it know more (floor 3).

transformers shapes the logits by that number when it computes a loss of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from sidepath.injection.registry import Installed, Registry

_NUMBER = "vocab_size"


def learn_tokens(model: nn.Module, registry: Registry, installed: Installed) -> None:
    """Let the model's config name the tokens that a new adapter knows too. In place."""
    rows = (path for path, site in installed.sites.items() if site.kind == "tokens")
    reach = max((installed.deltas[path].reach for path in rows), default=0)
    if reach:
        registry.reaches[installed.name] = reach
        _tell(model, registry)


def forget_tokens(model: nn.Module, registry: Registry, name: str) -> None:
    """The inverse of `learn_tokens`, for the adapter of this name. In place."""
    if registry.reaches.pop(name, 0):
        _tell(model, registry)


def _tell(model: nn.Module, registry: Registry) -> None:
    reach = max(registry.reaches.values(), default=0)
    for number, settings in enumerate(_settings(model)):
        if _NUMBER in vars(settings):
            own = registry.vocabulary.setdefault(number, settings.vocab_size)
            settings.vocab_size = max(own, reach)


def _settings(model: nn.Module) -> Iterator[Any]:
    """A model's config, that of its text part where it is another one, and the model: some keep the
    number themselves.
    """
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    if callable(getter):
        text = getter()
        yield text
        if config is not text:
            yield config
    yield model
