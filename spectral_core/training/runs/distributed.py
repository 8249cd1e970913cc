"""Several processes that train one adapter, each on its rows of one common batch.

Started by ``torch.distributed.run`` or ``accelerate launch``, which set RANK, WORLD_SIZE and MASTER_ADDR.
Every process draws the noise of the whole batch and takes its rows, so that the result is that of one process
with the whole batch, up to the order of sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import SpectralAdapterError


@dataclass(frozen=True)
class World:
    """This process's place among ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This process's part of ``count`` rows."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over the processes; one exchange for all of them."""
        if self.size == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([t.detach().float().reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        parts = (flat / self.size).split([t.numel() for t in tensors])
        return [p.reshape(t.shape).to(t) for p, t in zip(parts, tensors, strict=True)]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        found = torch.tensor(float(flag), device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return bool(found)

    def same_everywhere(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the main one's values."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), 0)


def world(expected: int = 0) -> World:
    """The processes that take part. ``expected``: refuse any other number of them.

    Some launchers start a single process without a word (``accelerate launch --cpu`` does).
    """
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    found = World(torch.distributed.get_rank(), torch.distributed.get_world_size()) if ready else World()
    if expected and found.size != expected:
        raise SpectralAdapterError(
            f"{found.size} process(es) take part in the training, expected {expected}: start it with "
            f"'python -m torch.distributed.run --nproc_per_node {expected} -m spectral_core train …', or "
            "change the setting 'processes'"
        )
    return found


@contextmanager
def joined() -> Iterator[torch.device | None]:
    """Join the other processes when a launcher started several; the device of this one, None alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size <= 1 or not torch.distributed.is_available() or torch.distributed.is_initialized():
        yield None
        return
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(
        os.environ.get("LOCAL_WORLD_SIZE", size)
    )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        torch.distributed.destroy_process_group()
