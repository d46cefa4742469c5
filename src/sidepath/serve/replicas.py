"""Replicas on Ray Serve (floor 5; extra `scale`).

Each is a process with an engine of its own. Ray starts them, starts anew those that end, and
chooses who answers: an adapter's requests go where it was asked for before (Ray's model
multiplexing, by the key of the adapter's version), until that one is full. The entrance is this
process': Ray's own HTTP proxy is not started, so that nothing goes round the gate.

Ray itself listens on all interfaces, whatever address it is told; `secluded.py` says who may ask it
anything, and is needed before this is imported.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.types import Message

from sidepath.errors import Overloaded, ReplicaLost, ServeError, SidepathError, in_one_line
from sidepath.serve.bodies import Most
from sidepath.serve.engine import Engine
from sidepath.serve.replica import Held, Replica, Sent, Source, Standing, share_of_cores
from sidepath.serve.secluded import refuse_open

MOST_MODELS = 256
"""Adapters that Ray counts as being with one replica; the least recently asked for goes first."""
OBJECT_BYTES = 128 * 2**20
"""Of the memory that Ray's processes share; bodies and answers go through it."""
_TELL_SECONDS = 10.0
_STARTS = 3
"""Ray gives its own processes 30 s to come up; a busy machine has what they need ready by then."""
_FAULT = "fault"
_QUIET = {"log_level": "ERROR", "enable_access_log": False}
_LOST = (RayActorError, DeploymentUnavailableError)


@dataclass(frozen=True)
class Scale:
    """How many replicas there are, and how much each and all of them take."""

    count: int
    rows: int
    """Requests that one answers at a time; others wait at the entrance."""
    queue: int
    """Requests that wait there; one more is turned away."""
    gpus: int = 0
    """GPUs of each."""


class OnRay:
    """One replica, in the process that Ray runs it in."""

    def __init__(
        self, make: Callable[[], Engine], base: str, most: Most, count: int, fault: Path
    ) -> None:
        """`fault`: the file that tells the entrance why this cannot be made."""
        share_of_cores(count, os.cpu_count() or 1)
        name = serve.get_replica_context().replica_id.unique_id
        self._sources: dict[str, Source] = {}
        try:
            self._replica = Replica(name, make, base, most, self._bring)
        except SidepathError as error:
            fault.write_text(str(error))
            raise

    async def _bring(self, source: Source) -> None:
        self._sources[source.key] = source
        await self.held(source.key)

    @serve.multiplexed(max_num_models_per_replica=MOST_MODELS)  # type: ignore[untyped-decorator]
    async def held(self, key: str) -> Held:
        """An adapter that is with this replica from now on, as Ray tells everybody."""
        await asyncio.to_thread(self._replica.have, self._sources[key])
        return Held(self._replica, key)

    async def answer(self, sent: Sent) -> AsyncGenerator[Message, None]:
        """The messages of a response."""
        async for message in self._replica.answer(sent):
            yield message

    async def load(self, source: Source) -> str | None:
        """Read an adapter and check it whole."""
        digest = await asyncio.to_thread(self._replica.load, source)
        await self._bring(source)
        return digest

    async def have_all(self, sources: list[Source]) -> list[str | SidepathError | None]:
        """Know adapters."""
        return await asyncio.to_thread(self._replica.have_all, sources)

    async def forget(self, key: str) -> None:
        """Know one no more."""
        await asyncio.to_thread(self._replica.forget, key)

    async def standing(self) -> Standing:
        """How it stands."""
        return await asyncio.to_thread(self._replica.standing)

    def check_health(self) -> None:
        """Ray asks this now and then, and starts a replica anew that fails it."""
        self._replica.check()


class Replicas:
    """The replicas of one server, seen from its entrance (`Asked` and `Told`)."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def ask(self, sent: Sent) -> AsyncGenerator[Message, None]:
        """The messages of a response; whoever closes this cancels. Errors: `ReplicaLost`;
        `Overloaded` where too many wait already.
        """
        options: dict[str, Any] = {"method_name": "answer", "stream": True}
        if sent.source is not None:
            options["multiplexed_model_id"] = sent.source.key
        response = self._handle.options(**options).remote(sent)
        try:
            async for message in response:
                yield message
        except BackPressureError as error:
            raise Overloaded("too many requests wait", hint="ask again later") from error
        except _LOST as error:
            raise ReplicaLost("the replica that was to answer has ended") from error
        finally:
            response.cancel()

    async def standings(self) -> list[Standing]:
        """Of each replica that tells it in time."""
        try:
            answers = await self._handle.broadcast("standing").results_async(
                timeout_s=_TELL_SECONDS, return_exceptions=True
            )
        except (TimeoutError, *_LOST):
            return []
        found = [each for each in answers if isinstance(each, Standing)]
        return sorted(found, key=lambda standing: standing.replica)

    def load(self, source: Source) -> str | None:
        """Let one replica read an adapter: the one that will be asked for it."""
        asked = self._handle.options(method_name="load", multiplexed_model_id=source.key)
        try:
            digest: str | None = asked.remote(source).result()
        except Exception as error:
            raise _ours(error) from error
        return digest

    def have(self, sources: Sequence[Source]) -> list[list[str | SidepathError | None]]:
        """Let every replica know adapters. One that ends meanwhile is told with the requests."""
        return self._every("have_all", list(sources))

    def forget(self, key: str) -> None:
        """Let every replica forget one."""
        self._every("forget", key)

    def _every(self, method: str, argument: Any) -> list[Any]:
        try:
            answers = self._handle.broadcast(method, argument).results(return_exceptions=True)
        except Exception as error:
            raise _ours(error) from error
        failed = [each for each in answers if isinstance(each, Exception)]
        for each in failed:
            if not isinstance(each, _LOST):
                raise _ours(each)
        return [each for each in answers if not isinstance(each, Exception)]


def _ours(error: Exception) -> BaseException:
    """What a replica raised, as it raised it; `ReplicaLost` where it ended."""
    if isinstance(error, _LOST):
        return ReplicaLost("a replica has ended meanwhile", hint="try again")
    if isinstance(error, RayTaskError):
        cause: BaseException = error.cause
        return cause
    return ServeError(f"the replicas cannot be told: {type(error).__name__}", found=error)


@contextmanager
def running(make: Callable[[], Engine], base: str, most: Most, scale: Scale) -> Iterator[Replicas]:
    """Start Ray and the replicas on this machine; within the block they answer, after it nothing of
    it runs and nothing lies on the disk. `make` is called in each replica's process, and has to
    name what it needs by paths that hold there.
    """
    refuse_open()
    with tempfile.TemporaryDirectory(prefix="sp-") as folder:
        _start_ray(folder, scale.count)
        try:
            yield Replicas(_deployed(make, base, most, scale, Path(folder, _FAULT)))
        finally:
            ray.shutdown()  # Serve's own would ask each replica to drain: the entrance has waited


def _start_ray(folder: str, cpus: int) -> None:
    """Errors: `ServeError` where it does not come up; nothing of it runs then."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    faults: list[Exception] = []
    while len(faults) < _STARTS:
        try:
            ray.init(
                address="local",  # one of our own, whatever RAY_ADDRESS says
                include_dashboard=False,
                object_store_memory=OBJECT_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
                num_cpus=cpus,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
            serve.start(http_options={"location": "NoServer"}, logging_config=_QUIET)
            return
        except Exception as error:
            faults.append(error)
            ray.shutdown()
        except BaseException:
            ray.shutdown()
            raise
    raise ServeError("Ray cannot be started", found=in_one_line(faults[-1])[:500]) from faults[-1]


def _deployed(make: Callable[[], Engine], base: str, most: Most, scale: Scale, fault: Path) -> Any:
    """The handle of the replicas, once all are ready. Errors: `ServeError` with what the first that
    could not be started said.
    """
    deployment = serve.deployment(OnRay).options(
        name="replica",
        num_replicas=scale.count,
        max_ongoing_requests=scale.rows,
        max_queued_requests=scale.queue,
        ray_actor_options={"num_cpus": 0, "num_gpus": scale.gpus},
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=1,
        logging_config=_QUIET,
    )
    bound = deployment.bind(make, base, most, scale.count, fault)
    try:
        return serve.run(bound, name="sidepath", route_prefix=None)
    except RuntimeError as error:
        found = fault.read_text() if fault.exists() else str(error)
        raise ServeError("the replicas cannot be started", found=found) from error
