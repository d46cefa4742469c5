"""Replicas in this process, behind the real entrance: real engines, and ends that are told."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from starlette.types import Message

from sidepath.errors import ReplicaLost, SidepathError
from sidepath.serve.bodies import Most
from sidepath.serve.engine import Engine
from sidepath.serve.replica import Replica, Sent, Source, Standing


class Nearby:
    """Sends each request to the first replica that has its adapter, else to the first there is.

    `ends`: called before each message of a response, with its number and that of the attempt; what
    it says ends the replica, as far as the entrance can tell.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = list(replicas)
        self.asked: list[tuple[str, Sent]] = []
        self.ends: Callable[[int, int], bool] = lambda number, attempt: False

    async def ask(self, sent: Sent) -> AsyncGenerator[Message, None]:
        """The messages of a response."""
        key = None if sent.source is None else sent.source.key
        having = [each for each in self.replicas if key in each.standing().resident]
        replica = (having or self.replicas)[0]
        attempt = len([None for _, other in self.asked if other is sent])
        self.asked.append((replica.name, sent))
        async with aclosing(replica.answer(sent)) as messages:
            number = 0
            async for message in messages:
                if self.ends(number, attempt):
                    raise ReplicaLost("ended")
                yield message
                number += 1
        if self.ends(number, attempt):
            raise ReplicaLost("ended")

    async def standings(self) -> list[Standing]:
        """How each stands."""
        return [each.standing() for each in self.replicas]

    def load(self, source: Source) -> str | None:
        """Read an adapter by the last one."""
        return self.replicas[-1].load(source)

    def have(self, sources: Sequence[Source]) -> list[list[str | SidepathError | None]]:
        """Let each know adapters."""
        return [each.have_all(list(sources)) for each in self.replicas]

    def forget(self, key: str) -> None:
        """Let each forget one."""
        for each in self.replicas:
            each.forget(key)


@contextmanager
def nearby(count: int, make: Callable[[], Engine], most: Any = None) -> Iterator[Nearby]:
    """So many replicas, called r0 and so on, over a base called "base"."""
    replicas = [Replica(f"r{number}", make, "base", most or Most()) for number in range(count)]
    try:
        yield Nearby(replicas)
    finally:
        for each in replicas:
            each.close()
