"""Pictures drawn by the host's own sampler, several at once, each with the noise of its own seed.

Shapes: latents (N, C, h, w), with frames where the model has them; the empty one (1, …).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from ..training.progress import check_interrupt

TOGETHER = 4  # pictures in a batch


@dataclass(frozen=True)
class Way:
    """How a picture is drawn: steps, guidance (1: none), the host's names of sampler and schedule."""

    steps: int
    cfg: float
    sampler: str = "euler"
    scheduler: str = "simple"


def draw(
    model: Any,
    positive: Any,
    negative: Any | None,
    empty: Tensor,
    seeds: Sequence[int],
    way: Way,
    tick: Callable[[int], None] = lambda steps: None,
) -> Tensor:
    """Latents of one prompt, one for each seed. negative None: without guidance; ``tick`` gets steps done.

    A picture depends on its own seed and not on what is drawn beside it.
    """
    parts = []
    for start in range(0, len(seeds), TOGETHER):
        check_interrupt()
        chunk = seeds[start : start + TOGETHER]
        many = len(chunk)
        parts.append(
            comfy.sample.sample(
                model,
                torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in chunk]),
                way.steps,
                1.0 if negative is None else way.cfg,
                way.sampler,
                way.scheduler,
                positive,
                positive if negative is None else negative,
                empty.expand(many, *empty.shape[1:]).clone(),
                callback=lambda *_, n=many: tick(n),
                disable_pbar=True,
                seed=chunk[0],
            )
        )
    return torch.cat(parts)
