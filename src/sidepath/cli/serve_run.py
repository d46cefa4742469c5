"""The settings of the verb serve (floor 7).

Nothing here may import torch: `sidepath --help` reads this class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sidepath.cli.runs import BaseRun
from sidepath.config import require


@dataclass(frozen=True, kw_only=True)
class ServeRun(BaseRun):
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
    merge: str | None = None
    """Serve this adapter alone, merged into the base, at the base's own speed."""

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
            },
        )
