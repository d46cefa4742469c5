"""Which names of models there are, and for whom (floor 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sidepath.errors import UnknownAdapter, meant
from sidepath.serve.gate import Caller
from sidepath.serve.versions import Version


class Names:
    """The names that a server answers to: that of its base, and those of its adapters, of which
    `versions` gives what there are just now.
    """

    def __init__(self, versions: Callable[[], list[Version]], base: str) -> None:
        self._versions, self.base = versions, base

    def listed(self, caller: Caller) -> list[dict[str, Any]]:
        """What `/v1/models` shows: the models that this caller may ask."""
        head = {"object": "model", "created": 0, "owned_by": "sidepath"}
        found: list[dict[str, Any]] = [{"id": self.base, **head, "parent": None}]
        for version in self._versions():
            more = {"parent": self.base, "generation": version.generation}
            found.append({"id": version.name, **head, **more})
        return [model for model in found if caller.may_ask(model["id"])]

    def adapter(self, caller: Caller, model: str) -> str | None:
        """The adapter that a caller means by a name; None: the base.

        Errors: `UnknownAdapter`. A caller is not told of models that it may not ask: to it, they
        are not there.
        """
        names = [self.base, *(version.name for version in self._versions())]
        known = [name for name in names if caller.may_ask(name)]
        if model not in known:
            raise self.unknown(model, known)
        return None if model == self.base else model

    def unknown(self, model: str, known: list[str]) -> UnknownAdapter:
        """The error for a name that nothing is served under."""
        return UnknownAdapter(f'no model "{model}" is served', hint=meant(model, known))
