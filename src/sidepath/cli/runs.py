"""The settings of each command that are not a method's or the training loop's (floor 7).

Nothing here may import torch: `sidepath --help` reads these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sidepath.config import check, require

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Quantise = Literal["none", "nf4"]


@dataclass(frozen=True, kw_only=True)
class BaseRun:
    """What every command that loads a base asks for."""

    base: str | None = field(default=None, metadata={"place": "base"})
    """Folder of the base model and its tokenizer, or `hub:OWNER/NAME[@REVISION]`; the embedded
    base when not given."""
    dtype: Dtype = "auto"
    """Data type of the base's weights in memory; `auto` keeps the one they are stored in."""
    device: Device = "auto"
    """Where to compute; `auto` takes the GPU when there is one."""
    quantise: Quantise = "none"
    """Pack the base's linear layers into 4 bits (`nf4`) while loading it; they compute in
    `dtype`, bfloat16 when that is `auto`. A base that is stored packed needs no flag."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TrainRun(BaseRun):
    """What `train` reads and writes."""

    data: tuple[str, ...] = field(metadata={"splits": False})
    """Training data: a JSONL, JSON, CSV, TSV or Parquet file, or a data set of the hub as
    `hub:OWNER/NAME[@REVISION][,config=CONFIG][,split=SPLIT]`, with prompt and completion,
    messages, text, or text and label; give the flag again for more."""
    output: str
    """Folder that the adapter is saved into."""
    method: str = "lora"
    """The method of adaptation."""
    new_tokens: tuple[str, ...] = field(default=(), metadata={"splits": False})
    """A token that the base does not know, as it stands in the data: its row of the embedding and
    of the head is trained with a LoRA and saved with it; give the flag again for more."""
    beside: dict[str, str] = field(default_factory=dict, metadata={"place": "adapter"})
    """Adapters that a fusion composes, as NAME=FOLDER: they are loaded onto the base first and
    stay as they are; give the flag again for more."""
    eval_data: str | None = None
    """Held-out data in the same form; their metrics are reported."""
    weights: tuple[float, ...] | None = None
    """Share of the rows drawn from each of the data; by their numbers of rows when not given."""
    stream: bool = False
    """Keep the tokenised rows in files instead of in memory, for data larger than memory."""
    columns: dict[str, str] = field(default_factory=dict)
    """Which column of the file holds a field, as in `prompt=question`."""
    max_tokens: int = 1024
    """Longest row in tokens; longer ones are truncated and counted."""
    limit: int | None = None
    """Use only the first rows of the data."""
    distributed: Literal["none", "ddp", "fsdp"] = "none"
    """Train in the processes that torchrun started: each holds the base (ddp), or a share of
    it (fsdp)."""
    dry_run: bool = False
    """Plan, audit the data and take the gradients of one step; then stop and write nothing."""
    forgetting: bool = True
    """Measure after training what the base forgot: the loss of its own text before and after."""
    forgetting_data: str | None = None
    """Text to measure forgetting on; sampled from the base itself when not given."""
    track: tuple[str, ...] = ()
    """Trackers that get each step's figures: tensorboard, wandb."""
    resume: bool = False
    """Go on from the newest checkpoint of this output."""
    overwrite: bool = False
    """Replace the adapter that the output folder holds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            {
                "data": len(self.data) > 0,
                "max_tokens": self.max_tokens >= 2,
                "limit": self.limit is None or self.limit >= 1,
            },
        )


@dataclass(frozen=True, kw_only=True)
class PlanRun:
    """What `plan` reckons with."""

    method: str = "lora"
    """The method of adaptation."""
    new_tokens: tuple[str, ...] = field(default=(), metadata={"splits": False})
    """A token that the base does not know; give the flag again for more."""
    batch_size: int = 8
    """Rows in one forward pass, for the memory estimate."""
    max_tokens: int = 1024
    """Tokens in a row, for the memory estimate."""
    dtype: Dtype = "auto"
    """Data type of the base's weights; `auto` takes the one its config states."""
    gpu_gib: float | None = None
    """Memory of a GPU in GiB; the share of it that the step takes is told."""

    def __post_init__(self) -> None:
        check(self)
        require(
            self,
            {
                "batch_size": self.batch_size >= 1,
                "max_tokens": self.max_tokens >= 1,
                "gpu_gib": self.gpu_gib is None or 0 < self.gpu_gib < float("inf"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class AnswerRun(BaseRun):
    """What the commands share that let a base or an adapter answer."""

    adapter: str | None = field(default=None, metadata={"place": "adapter"})
    """Folder of the adapter, or `hub:OWNER/NAME[@REVISION]`; the base alone when not given."""
    beside: dict[str, str] = field(default_factory=dict, metadata={"place": "adapter"})
    """Adapters that a fusion composes, as NAME=FOLDER with the names they had in training; give
    the flag again for more."""
    allow_other_base: bool = False
    """Apply an adapter although its fingerprint says that it was made for another base."""
    columns: dict[str, str] = field(default_factory=dict)
    """Which column of the file holds a field, as in `prompt=question`."""
    limit: int | None = None
    """Use only the first rows of the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            {
                "beside": not self.beside or self.adapter is not None,
                "limit": self.limit is None or self.limit >= 1,
            },
        )


@dataclass(frozen=True, kw_only=True)
class EvalRun(AnswerRun):
    """What `eval` measures."""

    data: str
    """Evaluation data in the training data's form."""
    batch_size: int = 8
    """Rows in one forward pass."""
    max_new_tokens: int = 64
    """Longest generated completion in tokens, for the metrics that read text."""
    metrics: tuple[str, ...] | None = None
    """Metrics to measure; all that the data allow when not given."""
    max_tokens: int = 1024
    """Longest row in tokens; longer ones are truncated and counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            {
                "batch_size": self.batch_size >= 1,
                "max_new_tokens": self.max_new_tokens >= 1,
                "max_tokens": self.max_tokens >= 2,
            },
        )


@dataclass(frozen=True, kw_only=True)
class GenerateRun(AnswerRun):
    """What `generate` completes, and how."""

    prompt: tuple[str, ...] = field(default=(), metadata={"splits": False})
    """A prompt to complete; give the flag again for more."""
    data: str | None = None
    """A JSONL or CSV file whose prompts are completed."""
    max_new_tokens: int = 64
    """Longest completion in tokens."""
    temperature: float = 0.0
    """Softmax temperature of the sampling; 0 always takes the likeliest token."""
    batch_size: int = 8
    """Prompts completed at once."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            {
                "max_new_tokens": self.max_new_tokens >= 1,
                "temperature": self.temperature >= 0,
                "batch_size": self.batch_size >= 1,
            },
        )


@dataclass(frozen=True, kw_only=True)
class MergeRun:
    """How `merge` writes the merged model."""

    skip_parity: bool = False
    """Publish without running the merged model beside the un-merged one."""
    data: str | None = None
    """Text that the two are run on: a .txt file with a text on each line, or data in one of the
    forms that training takes; the first 2,048 tokens of it. A built-in few when not given."""
    dtype: Dtype = "auto"
    """Data type of the merged weights; `auto` keeps the base's."""
    quantise: Quantise = "none"
    """Say what share of each update would survive packing the merged weights into 4 bits
    (`nf4`); what is written is not packed."""
    overwrite: bool = False
    """Replace the merged model that the output folder holds."""
    allow_other_base: bool = False
    """Apply an adapter although its fingerprint says that it was made for another base."""

    def __post_init__(self) -> None:
        check(self)
        require(self, {"data": self.data is None or not self.skip_parity})


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """What `demo` writes."""

    output: str = "demo-output"
    """Folder for the adapters and the report."""
    seed: int = 0
    """Seed of the demo's data and training."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """The settings of a verb that has none."""


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """How `bench` measures."""

    rounds: int = 7
    """Runs of each way that count, after a warm-up."""
    threads: int = 2
    """Threads that torch computes with, ours and the peer alike."""
    device: Device = "auto"
    """Where to measure; `auto` takes the GPU when there is one."""
    output: str | None = None
    """Folder for bench.json, bench.md and a picture; files of these names are replaced."""
    quick: bool = False
    """Tiny shapes that show in seconds that every figure runs; not a measurement."""

    def __post_init__(self) -> None:
        check(self)
        require(self, {"rounds": self.rounds >= 1, "threads": self.threads >= 1})
