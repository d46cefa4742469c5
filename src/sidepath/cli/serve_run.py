"""The settings of the verb serve (floor 7).

Nothing here may import torch: `sidepath --help` reads these classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sidepath.cli.runs import BaseRun
from sidepath.config import require

HOST = "127.0.0.1"
"""The one interface that is listened on."""


@dataclass(frozen=True, kw_only=True)
class GateRun(BaseRun):
    """Who may ask a server, how much, and what may be changed while it runs."""

    keys: str | None = None
    """File of the callers' hashed keys; without it anybody on this machine may ask, and nothing
    can be changed."""
    new_key: str | None = None
    """Make a key of this name instead of serving: it is printed once, the file gets its hash."""
    key_admin: bool = False
    """Let the new key load and unload adapters."""
    key_models: tuple[str, ...] | None = None
    """Names of the models that the new key may ask; all of them when not given."""
    key_per_minute: float | None = None
    """Requests a minute that the new key may send; any number when not given."""
    key_at_once: int | None = None
    """Answers that the new key may wait for at once; any number when not given."""
    allow_loading: str | None = None
    """Let admin keys load adapters while the server runs, from folders below this one; nothing can
    be loaded when not given."""
    max_rank: int = 256
    """Highest rank of an adapter loaded so."""
    max_adapter_bytes: int = 2**30
    """Most bytes in the folder of an adapter loaded so."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens; what the context has room for when not given."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; what the context has room for when not given."""
    connections: int = 512
    """Connections that may be open at once; one more is turned away."""
    head_seconds: float = 10.0
    """Time for the head of a request to come; then its connection is closed."""
    body_seconds: float = 60.0
    """Time for its body."""
    stall_seconds: float = 30.0
    """How long a caller may leave unread what it was sent; then its request is cancelled."""
    drain_seconds: int = 30
    """How long SIGTERM, or unloading an adapter, waits for answers that have begun."""

    def __post_init__(self) -> None:
        super().__post_init__()
        of_key = (self.key_models, self.key_per_minute, self.key_at_once)
        plain = not self.key_admin and of_key == (None, None, None)
        limits = (self.max_prompt_tokens, self.max_new_tokens)
        seconds = (self.head_seconds, self.body_seconds, self.stall_seconds, self.drain_seconds)
        names = ("head_seconds", "body_seconds", "stall_seconds", "drain_seconds")
        require(
            self,
            {
                "keys": self.keys is not None or (not self.new_key and not self.allow_loading),
                "key_admin": self.new_key is not None or plain,
                "max_rank": self.max_rank >= 1,
                "max_adapter_bytes": self.max_adapter_bytes >= 1,
                "max_prompt_tokens": limits[0] is None or limits[0] >= 1,
                "max_new_tokens": limits[1] is None or limits[1] >= 1,
                "connections": self.connections >= 1,
                **{name: value > 0 for name, value in zip(names, seconds, strict=True)},
            },
        )


@dataclass(frozen=True, kw_only=True)
class ServeRun(GateRun):
    """What `serve` serves, and how much at a time."""

    engine: Literal["sidepath", "vllm"] = "sidepath"
    """`sidepath` serves here. `vllm` serves nothing: it checks every adapter as vLLM would take it
    and prints the command that serves them with vLLM."""
    adapters: str | None = None
    """Folder of adapters: each folder in it is served under its own name. Or one adapter's folder.
    Or an adapter on the hub, as `hub:OWNER/NAME[@REVISION]`. Without it the base alone is served.
    Weights are read when an adapter is first asked for."""
    port: int = 8000
    """Port of this machine (127.0.0.1) to listen on; 0 takes a free one."""
    name: str | None = None
    """The name that asks for the base alone; that of its folder when not given."""
    allow_other_base: bool = False
    """Serve adapters although their fingerprints say that they were made for another base."""
    rows: int = 16
    """Requests that run at once."""
    slots: int = 8
    """Different adapters that run at once, beside the base."""
    context: int = 2048
    """Longest request in tokens, prompt and answer together; at most the base's own context."""
    cached_tokens: int = 32768
    """Tokens of all running requests together, which bounds the memory of their keys and values."""
    step_tokens: int = 256
    """Tokens of one step: shorter steps answer more evenly, longer ones take prompts faster."""
    queue: int = 1024
    """Requests that may wait; one more is turned away."""
    adapter_memory: int = 2**30
    """Bytes of adapters on the model; who was not asked for longest makes room for others."""
    host_memory: int = 2**30
    """Bytes of adapters that left the model and are kept in memory; 0: they are read again."""

    prefixes: int = 16
    """Rows of ended requests that are kept, for those that begin alike; 0: none."""
    laid_out: bool = True
    """Keep the linear layers of a base on the CPU a second time, laid out in blocks, which multiply
    few rows in half to two thirds of the time."""
    merge: str | None = None
    """Serve this adapter alone, merged into the base, at the base's own speed."""
    replicas: int | None = None
    """Answer with so many processes behind one entrance, each with a base of its own, and the
    limits on rows, slots and memory each; Ray Serve runs them (extra `scale`). The entrance
    listens on this machine only, but Ray's own ports on ALL its interfaces, for whoever has the
    token that is made for each run: keep them behind a firewall."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            {
                "port": 0 <= self.port < 65536,
                "rows": self.rows >= 1,
                "slots": self.slots >= 1,
                "context": self.context >= 2,
                "cached_tokens": self.cached_tokens >= 2,
                "step_tokens": self.step_tokens > self.rows,
                "queue": self.queue >= 1,
                "prefixes": self.prefixes >= 0,
                "adapter_memory": self.adapter_memory >= 1,
                "host_memory": self.host_memory >= 0,
                "replicas": self.replicas is None or self.replicas >= 1,
            },
        )
