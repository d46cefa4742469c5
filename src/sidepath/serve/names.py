"""Which names of models there are, and for whom (floor 5)."""

from __future__ import annotations

from typing import Any, Protocol

from sidepath.errors import UnknownAdapter, meant
from sidepath.serve.gate import Caller
from sidepath.serve.versions import Version


class Named(Protocol):
    """Adapters by their names: an engine's, or those of several."""

    @property
    def merged(self) -> bool: ...

    def versions(self) -> list[Version]: ...


class Names:
    """The names that a server answers to: that of its base, unless it does not answer itself
    (`alone`), and those of its adapters.
    """

    def __init__(self, adapters: Named, base: str, alone: bool = True) -> None:
        self._adapters, self.base = adapters, base
        self._own = [base] if alone and not adapters.merged else []

    def listed(self, caller: Caller) -> list[dict[str, Any]]:
        """What `/v1/models` shows: the models that this caller may ask."""
        head = {"object": "model", "created": 0, "owned_by": "sidepath"}
        found: list[dict[str, Any]] = [{"id": own, **head, "parent": None} for own in self._own]
        for version in self._adapters.versions():
            more: dict[str, Any] = {"parent": self.base, "generation": version.generation}
            more |= {"digest": version.digest}
            found.append({"id": version.name, **head, **more})
        return [model for model in found if caller.may_ask(model["id"])]

    def adapter(self, caller: Caller, model: str) -> str | None:
        """The adapter that a caller means by a name; None: the base.

        Errors: `UnknownAdapter`. A caller is not told of models that it may not ask: to it, they
        are not there.
        """
        names = [*self._own, *(version.name for version in self._adapters.versions())]
        known = [name for name in names if caller.may_ask(name)]
        if model not in known:
            raise self.unknown(model, known)
        return None if model == self.base else model

    def unknown(self, model: str, known: list[str]) -> UnknownAdapter:
        """The error for a name that nothing is served under."""
        return UnknownAdapter(f'no model "{model}" is served', hint=meant(model, known))
