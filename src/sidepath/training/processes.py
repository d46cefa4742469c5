"""The processes that train together, and the few things they say to one another.

Every process holds all trained tensors and makes the same step with them: the gradients are
added up over all processes in one flat vector, in a fixed layout, so that the sum has the same
bits in each process and in a resumed run. (Hooks that send gradients while the backward pass
runs, as torch's DistributedDataParallel does, regroup them after the first step: a resumed run
of three or more processes would add in another order. An adapter's gradients are megabytes;
there is little to hide behind the backward pass.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sidepath.errors import TrainError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """One process among those of a run; alone unless torch.distributed was started."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU
    """Where messages have to be: the GPU with NCCL, else the CPU."""

    @classmethod
    def of_this_run(cls) -> Processes:
        """What `torchrun` or `accelerate launch` started, once torch.distributed is up."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        on_gpu = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else CPU
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in float64."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        result: list[float] = summed.tolist()
        return result

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes, in place.

        Summed in float32 (float64 for float64 gradients). A parameter that got no gradient in
        this process counts as zero, and keeps none when it got none anywhere.
        """
        if self.count == 1:
            return
        own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        wide = any(gradient.dtype == torch.float64 for gradient in own)
        dtype = torch.float64 if wide else torch.float32
        got = torch.tensor([p.grad is not None for p in parameters], dtype=dtype)
        flat = torch.cat([g.detach().to(self.device, dtype).reshape(-1) for g in own])
        flat = torch.cat([flat, got.to(self.device)])
        dist.all_reduce(flat)
        sizes = [*(gradient.numel() for gradient in own), len(parameters)]
        *sums, given = torch.split(flat, sizes)
        for parameter, summed, count in zip(parameters, sums, given.tolist(), strict=True):
            if count:
                parameter.grad = summed.view(parameter.shape).to(parameter.device, parameter.dtype)

    def all_of(self, numbers: Sequence[int]) -> list[int]:
        """The integers of all processes, in order of their ranks."""
        if self.count == 1:
            return list(numbers)
        size = torch.tensor([len(numbers)], device=self.device)
        sizes = [torch.zeros_like(size) for _ in range(self.count)]
        dist.all_gather(sizes, size)
        longest = int(max(sizes))
        mine = torch.zeros(longest, dtype=torch.int64, device=self.device)
        mine[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        gathered = [torch.zeros_like(mine) for _ in range(self.count)]
        dist.all_gather(gathered, mine)
        return [n for row, kept in zip(gathered, sizes, strict=True) for n in row[:kept].tolist()]

    def require_equal(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Raise a `TrainError` unless every process holds the same bits in these tensors."""
        if self.count == 1:
            return
        found = self.all_of([_digest(tensors)])
        if len(set(found)) > 1:
            raise TrainError(
                f"{what} are not the same in all processes",
                found=", ".join(f"{value & 0xFFFFFFFF:08x}" for value in found),
                hint="each process must start from the same adapter: seed torch before inject",
            )

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()


ALONE = Processes()
"""One process by itself."""


def _digest(tensors: Mapping[str, Tensor]) -> int:
    """63 bits of the SHA-256 of the tensors' bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode())
        digest.update(raw.numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little") >> 1
