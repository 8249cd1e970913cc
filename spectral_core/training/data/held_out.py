"""Which pictures judge a training instead of taking part in it.

Shapes: none; an example is its index.
"""

from __future__ import annotations

import torch

from ...errors import SpectralAdapterError


def held_out_of(count: int, share: float) -> tuple[int, ...]:
    """``share`` of ``count`` examples, always the same ones: at least one, and at least one is left to train
    on; none for a share of 0.

    Raises SpectralAdapterError where there is one example only.

    >>> held_out_of(10, 0.2)
    (1, 4)
    """
    if not share:
        return ()
    if count < 2:
        raise SpectralAdapterError(
            f"validation_share {share:g} of {count} picture: expected at least two, one to train on and one "
            "to judge by; add pictures, or set it to 0"
        )
    wanted = min(max(1, round(share * count)), count - 1)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted]
    return tuple(sorted(chosen.tolist()))
