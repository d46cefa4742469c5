"""The settings of the verb convert (floor 7).

Nothing here may import torch: `sidepath --help` reads this class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sidepath.config import check, require

FormatName = Literal["sidepath", "peft", "loralib", "mlx", "gguf", "kohya", "diffusers"]


@dataclass(frozen=True, kw_only=True)
class ConvertRun:
    """How `convert` reads and writes."""

    to: FormatName | None = None
    """The format to write: sidepath (our own folder), peft, loralib, mlx (mlx-lm), gguf
    (llama.cpp, Ollama), kohya or diffusers (text encoders of image pipelines)."""
    from_: FormatName | None = None
    """The format to read; found out when not given."""
    for_: Literal["vllm"] | None = None
    """Say what vLLM would refuse or compute wrongly, and what to do; with `--to peft` write the
    adapter so that it takes it: one rank, one scale."""
    base: str | None = field(default=None, metadata={"place": "base"})
    """Folder of the base, or its config.json where names and shapes are enough; our own format
    records the fingerprint of its weights."""
    alpha: float | None = None
    """The lora_alpha of a file of loralib's, which does not hold it."""
    fused: dict[str, str] = field(default_factory=dict)
    """Which equal parts of loralib's fused projections are adapted, as in `c_attn=101` for the
    first and the third of three; give the flag again for more."""
    component: Literal["text_encoder", "text_encoder_1", "text_encoder_2"] = "text_encoder"
    """Which part of an image pipeline is meant in a file of kohya's or diffusers'; the numbered
    ones are those of pipelines with two text encoders."""
    overwrite: bool = False
    """Replace the output that is there."""

    def __post_init__(self) -> None:
        check(self)
        patterns = self.fused.values()
        require(
            self,
            {
                "alpha": self.alpha is None or self.alpha > 0,
                "fused": all(one and set(one) <= {"0", "1"} and "1" in one for one in patterns),
                "for_": self.for_ is None or self.to in (None, "peft"),
            },
        )
