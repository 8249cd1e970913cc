"""Live adapters in the text encoders of a CLIP.

The host has no wrapper there, so ``encode_token_weights`` is replaced by an object patch, which the host puts
on when this clone is loaded and takes off again; it calls the one that was there before.

Shapes: those of :mod:`spectral_core.attach.update`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..model.places import CLIP
from .stack import Entry, Stack

METHOD = "encode_token_weights"


class Encoder:
    """``encode_token_weights`` with adapters on for its length."""

    is_spectral_live = True

    def __init__(self, stack: Stack, model: Any, previous: Callable[..., Any]) -> None:
        self.stack, self.model, self.previous = stack, model, previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with self.stack.on(self.model):
                return self.previous(*args, **kwargs)
        finally:
            self.stack.release()  # a prompt is encoded once; the next one may come in an hour


def add(clip: Any, entry: Entry) -> None:
    """Add an adapter to a CLIP (a clone: it is changed), in the forward path.

    Raises SpectralAdapterError for a layer that only a weight patch can change.
    """
    previous = clip.patcher.get_model_object(METHOD)
    entries: tuple[Entry, ...] = ()
    if getattr(previous, "is_spectral_live", False):  # one stack for all of ours: they add up in any order
        entries, previous = previous.stack.entries, previous.previous
    stack = Stack((*entries, entry), CLIP)
    stack.check(clip.cond_stage_model)
    stack.start_records()
    clip.patcher.add_object_patch(METHOD, Encoder(stack, clip.cond_stage_model, previous))
