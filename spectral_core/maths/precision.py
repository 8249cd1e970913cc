"""In which precision a product is computed: what autocast says, asked in a way that every torch since 2.1
understands.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """The precision that autocast now gives to products on a type of device ("cuda"); None while it is off.

    torch 2.4 made one function for all devices of what was one for each before, under another name.
    """
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == "cuda":
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    is_enabled = getattr(torch, f"is_autocast_{device}_enabled", None)  # a device without it has no autocast
    return getattr(torch, f"get_autocast_{device}_dtype")() if is_enabled and is_enabled() else None


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Inside it, products on the device keep the precision of their inputs, autocast or not."""
    if autocast_dtype(device.type) is None:  # an old torch knows no autocast of some devices, off or on
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
