"""vLLM's routes that load and unload adapters while the server runs (floor 5; extra `serve`).

Off without `Loading`, and for admin keys only. Every load of a name has a generation (`/v1/models`
shows it); a body that gives one changes that generation or nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse, Response

from sidepath.config import build, check
from sidepath.errors import (
    BadName,
    ConfigError,
    MergeError,
    NameTaken,
    NotAllowed,
    Outdated,
    RequestRefused,
    StoreError,
    TargetNotFound,
    UnknownAdapter,
    UnsupportedModule,
)
from sidepath.injection.registry import check_name
from sidepath.serve.bodies import Intake
from sidepath.serve.confined import Loading
from sidepath.serve.gate import administrator
from sidepath.serve.memory import out_of_memory, shed
from sidepath.serve.versions import Version
from sidepath.store.tensors import strict_json

_THREADS = 2
_OF_THE_FOLDER = (BadName, StoreError, MergeError, TargetNotFound, UnsupportedModule)
T = TypeVar("T")


@dataclass(frozen=True)
class LoadBody:
    """The body of `/v1/load_lora_adapter`."""

    lora_name: str
    """The name that will ask for it."""
    lora_path: str
    """The adapter's folder, from the root on that may be loaded from."""
    load_inplace: bool = False
    """Replace the adapter of that name; else a name that is taken is refused."""
    generation: int | None = None
    """The generation that is replaced, 0 for none; any other answers 409."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class UnloadBody:
    """The body of `/v1/unload_lora_adapter`."""

    lora_name: str
    """The name that will be unknown."""
    generation: int | None = None
    """The generation that is unloaded; any other answers 409."""

    def __post_init__(self) -> None:
        check(self)


class Changed(Protocol):
    """Adapters that come and go: an engine's, or those of several."""

    def versions(self) -> list[Version]: ...

    def load(self, name: str, place: Path) -> Version: ...

    def unload(self, name: str) -> Version: ...


class Changing:
    """Both routes of one server."""

    def __init__(
        self,
        adapters: Changed,
        base: str,
        loading: Loading | None,
        intake: Intake,
        drain_seconds: float,
    ) -> None:
        self._adapters, self._base, self._loading = adapters, base, loading
        self._intake, self._drain_seconds = intake, drain_seconds
        self._names: dict[str, tuple[asyncio.Lock, int]] = {}
        # Of their own: what waits for a disk must not keep bodies from being read.
        self._threads = ThreadPoolExecutor(_THREADS, "sidepath-loading")

    async def load(self, incoming: Incoming) -> Response:
        """Answers new requests of the name once it returns; older ones keep what they began with.

        Errors: `NotAllowed`, `RequestRefused`, `NameTaken`, `Outdated`; `Overloaded` for want of
        memory. Nothing has changed then.
        """
        asked, loading = await self._asked(incoming, LoadBody)
        async with self._alone(asked.lora_name):
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._threads, self._load, asked, loading)
            version = await work
        return JSONResponse(
            {
                "lora_name": version.name,
                "generation": version.generation,
                "message": f"Success: LoRA adapter '{version.name}' added successfully.",
            }
        )

    def _load(self, asked: LoadBody, loading: Loading) -> Version:
        name = asked.lora_name
        try:
            check_name(None, name)
            self._refuse_taken(asked)
            folder = loading.folder(asked.lora_path)
            return self._adapters.load(name, folder)
        except _OF_THE_FOLDER as error:
            raise RequestRefused(str(error)) from error
        except Exception as error:
            if out_of_memory(error):
                raise shed(error) from error
            raise

    def _refuse_taken(self, asked: LoadBody) -> None:
        if asked.lora_name == self._base:
            raise NameTaken(f'"{asked.lora_name}" is what the base is called')
        there = self._there(asked.lora_name)
        _refuse_outdated(asked.lora_name, there, asked.generation)
        if there is not None and not asked.load_inplace:
            raise NameTaken(
                f'an adapter "{asked.lora_name}" is loaded already',
                found=f"generation {there.generation}",
                hint='"load_inplace": true replaces it',
            )

    async def unload(self, incoming: Incoming) -> Response:
        """Refuses new requests of the name at once, and waits until those it answers have ended,
        `drain_seconds` at most: 202 says that some have not.

        Errors: `NotAllowed`, `RequestRefused`, `UnknownAdapter`, `Outdated`.
        """
        asked, _ = await self._asked(incoming, UnloadBody)
        async with self._alone(asked.lora_name):
            there = self._there(asked.lora_name)
            if there is None:
                raise UnknownAdapter(f'no adapter "{asked.lora_name}" is loaded')
            _refuse_outdated(asked.lora_name, there, asked.generation)
            version = self._adapters.unload(asked.lora_name)
        gone = await self._left(version)
        document = {
            "lora_name": version.name,
            "generation": version.generation,
            "gone": gone,
            "message": f"Success: LoRA adapter '{version.name}' removed successfully.",
        }
        return JSONResponse(document, 200 if gone else 202)

    async def _left(self, version: Version) -> bool:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._drain_seconds
        while not version.gone.is_set() and loop.time() < until:
            await asyncio.sleep(0.02)
        return version.gone.is_set()

    async def _asked(self, incoming: Incoming, kind: type[T]) -> tuple[T, Loading]:
        administrator(incoming)
        if self._loading is None:
            raise NotAllowed(
                "adapters are neither loaded nor unloaded while this server runs",
                hint="serve --allow-loading ROOT",
            )
        async with self._intake.body(incoming) as raw:
            return _understood(kind, raw), self._loading

    def _there(self, name: str) -> Version | None:
        versions = self._adapters.versions()
        return next((version for version in versions if version.name == name), None)

    @asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        """One change of a name at a time; what it was is looked at within."""
        lock, users = self._names.get(name, (asyncio.Lock(), 0))
        self._names[name] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._names.pop(name)
            if users > 1:
                self._names[name] = lock, users - 1


def _refuse_outdated(name: str, there: Version | None, generation: int | None) -> None:
    found = 0 if there is None else there.generation
    if generation is not None and generation != found:
        raise Outdated(
            f'"{name}" is of another generation by now',
            found=found if there is not None else "none is loaded",
            expected=generation,
            hint="look at /v1/models, and decide anew",
        )


def _understood(kind: type[T], raw: bytes) -> T:
    try:
        values = strict_json(raw)
    except ValueError as error:
        raise RequestRefused("the body is not JSON", found=str(error)[:200]) from error
    if not isinstance(values, dict):
        raise RequestRefused("the body is not a JSON object", found=type(values).__name__)
    needed: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
    missing = [
        f"{field.name} is missing"
        for field in needed
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise RequestRefused("the body cannot be followed", faults=missing)
    try:
        return build(kind, values)
    except ConfigError as error:
        raise RequestRefused("the body cannot be followed", faults=error.faults) from error
