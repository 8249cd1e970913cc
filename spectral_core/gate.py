"""STUB for the others to import against; its owner replaces it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

KINDS = ("mlp", "entropy")


def tensor_shapes(rank: int, kind: str) -> dict[str, tuple[int, ...]]:
    hidden = max(rank // 8, 4)
    return {
        "gate.w1": (hidden, rank + 1), "gate.b1": (hidden,), "gate.w2": (rank, hidden), "gate.bias": (rank,),
        "gate.mu": (), "gate.mean_open": (rank,),
    }


def trainable(kind: str) -> tuple[str, ...]:
    return ("gate.w1", "gate.b1", "gate.w2", "gate.bias")


def init(rank: int, kind: str, generator: Generator | None) -> dict[str, Tensor]:
    raise NotImplementedError
