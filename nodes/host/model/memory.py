"""Telling the host how much memory the adapters of a run need beside its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import compat


class Announcement:
    """A PREPARE_SAMPLING wrapper: room for ``needed(dtype)`` bytes is asked for before the model is loaded.

    What the adapters took is given back when the run ends (:meth:`..apply.stack.Stack.release`).
    """

    def __init__(self, needed: Callable[[torch.dtype], int]) -> None:
        self.needed = needed

    def __call__(self, executor: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        compat.free_memory(self.needed(compat.compute_dtype(model)), model.load_device)
        return executor(model, *args, **kwargs)
