"""Whether torch is tracing for its compiler, asked in a way that every torch since 2.1 understands."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _asked() -> Callable[[], bool]:
    """torch 2.3 gave the question a place in ``torch.compiler``; before, it was asked inside ``_dynamo``."""
    if hasattr(torch.compiler, "is_compiling"):
        return torch.compiler.is_compiling
    from torch._dynamo import external_utils

    return external_utils.is_compiling


is_compiling: Callable[[], bool] = _asked()
