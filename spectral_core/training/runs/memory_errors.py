"""Out of memory: told apart from other errors, and what to do about it."""

from __future__ import annotations

from pathlib import Path

import torch

from . import checkpoint

ADVICE = "lower batch_size (and raise accumulation), or set checkpointing"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory, of the GPU or the host, ran out."""
    kinds: tuple[type[BaseException], ...] = (MemoryError, torch.cuda.OutOfMemoryError)
    words = ("can't allocate memory", "out of memory")
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def explained(folder: Path) -> str:
    """What a user is told of a run in ``folder`` that ran out of memory."""
    kept = checkpoint.listed(folder)
    saved = f"the checkpoint of step {kept[0][0]} is kept" if kept else "no step was made"
    return (
        f"out of memory ({saved}): {ADVICE}. With the same settings the run goes on where it stopped; other "
        "settings begin a new run"
    )
