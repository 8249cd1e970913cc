"""The state of every random generator that a run may draw from, taken and put back.

The trainer draws from generators of its own; the global ones belong to it because a model, a listener or a
sampler may use them. Shapes: each state as its library gives it, kept as tensors and plain numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """torch (the present CUDA device's too), Python and NumPy: tensors for what is long, numbers for the
    rest."""

    tensors: dict[str, Tensor]
    python_version: int
    python_gauss: float | None
    numpy_position: int
    numpy_has_gauss: int
    numpy_gauss: float


def capture() -> RandomState:
    """The global generators as they are now."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert name == "MT19937" and isinstance(keys, np.ndarray), "NumPy's global generator is this one"
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()  # of this process's device; others would be woken up
    return RandomState(tensors, version, gauss, int(position), int(has_gauss), float(cached))


def restore(state: RandomState) -> None:
    """Put the global generators back; a CUDA device's only where there is one."""
    torch.set_rng_state(state.tensors["torch"])
    words = tuple(state.tensors["python"].tolist())
    random.setstate((state.python_version, words, state.python_gauss))
    keys = state.tensors["numpy"].numpy().astype(np.uint32)
    place = (state.numpy_position, state.numpy_has_gauss, state.numpy_gauss)
    np.random.set_state(("MT19937", keys, *place))
    if "cuda" in state.tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.tensors["cuda"])


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever the block draws, the global generators go on as if it had not."""
    before = capture()
    try:
        yield
    finally:
        restore(before)
