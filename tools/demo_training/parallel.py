"""Training on several processes of one thread each: on few cores faster than one process of several threads.

Every worker holds the whole model and takes its share of the batch; gradients are averaged, so all workers
make the same step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import autoencoder, unet

STAGES: dict[str, Callable[..., None]] = {
    "unet": unet.train,
    "autoencoder": autoencoder.train,
    "decoder": partial(autoencoder.train, steps=autoencoder.DECODER_STEPS, part="decoder"),
}


def work(rank: int, workers: int, meeting: str, stage: str, limits: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    STAGES[stage]("cpu", rank=rank, workers=workers, **limits)
    dist.destroy_process_group()


def train(stage: str, device: str, workers: int, limits: dict[str, Any]) -> None:
    """Run the stage in this process, or on that many processes of this machine's CPU."""
    if workers == 1:
        STAGES[stage](device, **limits)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = (workers, str(Path(folder) / "meeting"), stage, limits)
        torch.multiprocessing.spawn(work, args=arguments, nprocs=workers)
