"""The settings of the verb compare that are not the training loop's (floor 7).

Nothing here may import torch: `sidepath --help` reads this class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sidepath.cli.runs import BaseRun
from sidepath.config import require


@dataclass(frozen=True, kw_only=True)
class CompareRun(BaseRun):
    """What `compare` compares on, and how often."""

    data: str = "demo:sentiment"
    """Training data: a file or a data set of the hub as for `train`, or a task of the demo as
    demo:sentiment, demo:sql, demo:restaurant."""
    eval_data: str | None = None
    """Test rows in the same form; no trial trains on them and nothing is chosen by them. A demo
    task has its own."""
    otherwise: str | None = None
    """Data taken instead when the files of `data` and `eval_data` are not there."""
    metric: str | None = None
    """What is compared; the data's own when not given: accuracy for labels, a demo task's metric,
    else the loss."""
    columns: dict[str, str] = field(default_factory=dict)
    """Which column of the file holds a field, as in `text=sentence`."""
    preset: Literal["none", "which-matrices", "which-rank", "latency"] = "none"
    """Entrants of the LoRA paper's Tables 5, 6 and 1, made to fit the base, in place of
    [[method]] tables; `latency` trains nothing."""
    intrinsic: bool = False
    """Search for the task's intrinsic dimension (Li et al. 2018; Aghajanyan et al. 2020), in place
    of entrants: the fewest trained numbers that reach a share of full fine-tuning's score. In d of
    D dimensions, the learning rates are those of full fine-tuning times sqrt(D / d)."""
    share: float = 0.9
    """The share of full fine-tuning's score to reach: 0.9 finds what the papers call d90."""
    dimensions: tuple[int, ...] | None = None
    """Smallest and largest dimension to search in, and how many, each by the same factor above the
    last, as in `100,50000,12`; 12 from 100 to a tenth of the base's parameters when not given."""
    subspace: Literal["did", "said"] = "said"
    """One random projection into all parameters (did), or with a trained scale a layer (said)."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates tried for each entrant that names none of its own."""
    seeds: tuple[int, ...] = (3,)
    """Seeds of the trials; one number n stands for 0 to n-1. The first one tries the rates."""
    validation: float = 0.1
    """Share of the training rows that learning rates are judged on."""
    limit: int | None = None
    """Use only the first rows of the training data."""
    eval_limit: int | None = None
    """Use only the first rows of the test data."""
    max_tokens: int = 1024
    """Longest row in tokens; longer ones are truncated and counted."""
    max_new_tokens: int = 16
    """Longest generated completion in tokens, for the metrics that read text."""
    latency: tuple[str, ...] | None = ("1x128",)
    """Batches, as ROWSxTOKENS, that inference is timed at beside the base; `none` times nothing."""
    rounds: int = 20
    """Forward passes of each kind that latency is taken from."""
    output: str = "comparison"
    """Folder of the run table, from which a killed comparison goes on, and of the report."""
    workers: int = 1
    """Trials that run side by side."""
    through: Literal["processes", "ray"] = "processes"
    """What runs them: processes of this machine, or a Ray cluster (extra `scale`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            {
                "learning_rates": bool(self.learning_rates) and min(self.learning_rates) > 0,
                "seeds": bool(self.seeds) and min(self.seeds) >= 0 and self.seeds != (0,),
                "share": 0 < self.share <= 1,
                "dimensions": self.dimensions is None or _searchable(self.dimensions),
                "validation": 0 < self.validation < 1,
                "limit": self.limit is None or self.limit >= 2,
                "eval_limit": self.eval_limit is None or self.eval_limit >= 1,
                "max_tokens": self.max_tokens >= 2,
                "max_new_tokens": self.max_new_tokens >= 1,
                "rounds": self.rounds >= 1,
                "workers": self.workers >= 1,
            },
        )

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds that are meant."""
        one = len(self.seeds) == 1
        return tuple(range(self.seeds[0])) if one else tuple(dict.fromkeys(self.seeds))


def _searchable(dimensions: tuple[int, ...]) -> bool:
    """Whether these are a smallest, a larger largest, and a number of at least two."""
    return len(dimensions) == 3 and 1 <= dimensions[0] < dimensions[1] and dimensions[2] >= 2
