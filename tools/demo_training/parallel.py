"""Training on several processes of one thread each: on few cores faster than one process of several threads.

Every worker holds the whole model and takes its share of the batch; gradients are averaged, so all workers
make the same step.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from . import autoencoder, unet

STAGES = {"unet": unet.train, "refine": autoencoder.refine}


def work(rank: int, workers: int, meeting: str, stage: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    STAGES[stage]("cpu", rank=rank, workers=workers)
    dist.destroy_process_group()


def train(stage: str, workers: int) -> None:
    """Run the stage on that many processes of this machine's CPU."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (workers, str(Path(folder) / "meeting"), stage)
        torch.multiprocessing.spawn(work, args=arguments, nprocs=workers)
