"""The settings of the verb inspect (floor 7).

Nothing here may import torch: `sidepath --help` reads this class.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidepath.cli.runs import BaseRun
from sidepath.config import require


@dataclass(frozen=True, kw_only=True)
class InspectRun(BaseRun):
    """What `inspect` looks at."""

    base: str | None = field(default=None, metadata={"place": "base"})
    """Folder of the base; with it each update is also held against the weight beside it. Where
    data are given, the embedded base when not given."""
    widest: int = 1024
    """Weights whose smaller side is larger are not decomposed: a time that grows with its cube."""
    alpha: float | None = None
    """loralib's lora_alpha, for a file of loralib, which does not hold it."""
    html: str | None = None
    """Write a report with pictures to this file."""
    merged: str | None = None
    """Folder that this adapter was merged into: its measured parity is shown."""
    truncate: str | None = None
    """Write the adapter with fewer directions to --output: `r=4` keeps 4 of each layer,
    `energy=0.99` the fewest that hold this share of a layer's energy."""
    output: str | None = None
    """Folder that the truncated, or the advised, adapter is written to."""
    overwrite: bool = False
    """Replace the adapter that the output folder holds."""
    advise: bool = False
    """Find the smallest rank and the fewest kinds of matrices that keep the metric on --data."""
    tolerance: float = 0.01
    """How much worse the metric may become, in its own unit."""
    data: str | None = None
    """Data in the training data's form, which the metric is measured on."""
    metric: str | None = None
    """The metric; accuracy for labels and the loss for text when not given."""
    columns: dict[str, str] = field(default_factory=dict)
    """Which column of the file holds a field, as in `prompt=question`."""
    limit: int | None = None
    """Use only the first rows of the data."""
    max_tokens: int = 1024
    """Longest row in tokens; longer ones are truncated and counted."""
    max_new_tokens: int = 64
    """Longest generated completion in tokens, for the metrics that read text."""
    batch_size: int = 8
    """Rows in one forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            {
                "widest": self.widest >= 1,
                "alpha": self.alpha is None or self.alpha > 0,
                "tolerance": self.tolerance >= 0,
                "limit": self.limit is None or self.limit >= 1,
                "max_tokens": self.max_tokens >= 2,
                "max_new_tokens": self.max_new_tokens >= 1,
                "batch_size": self.batch_size >= 1,
            },
        )
