"""A model whose weights want no gradient, for the length of a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(roots: Iterable[nn.Module]) -> Iterator[None]:
    """No parameter wants a gradient."""
    flags = {id(p): (p, p.requires_grad) for root in roots for p in root.parameters()}
    try:
        for parameter, _ in flags.values():
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.values():
            parameter.requires_grad_(flag)
