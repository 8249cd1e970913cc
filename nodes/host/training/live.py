"""A training's events for whoever looks at the page, and the wish for what it has learned so far.

The events also lie in the run's ``events.jsonl``; the page reads them there after a reload. Sent as
``spectral_adapters.run``: ``name`` of the run, ``asked`` (the name that the node has), ``events``, ``memory``
in bytes.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.training.runs.events import Event

EVENT = "spectral_adapters.run"
SECONDS = 0.3  # between two messages
WISH = "keep.wish"  # a file in the run's folder: the page asks for the adapter as it is now


class Live:
    """Sends a run's events to every open page, steps a few at a time."""

    def __init__(self, name: str, asked: str) -> None:
        self._name, self._asked = name, asked
        self._waiting: list[Event] = []
        self._sent_at = 0.0

    def __call__(self, event: Event) -> None:
        self._waiting.append(event)
        now = time.monotonic()
        if event["event"] == "step" and now - self._sent_at < SECONDS:
            return
        self._sent_at = now
        events, self._waiting = self._waiting, []
        send(EVENT, {"name": self._name, "asked": self._asked, "events": events, "memory": memory()})


class Wish:
    """Looks for the wish before each batch; ``save`` keeps the adapter as it is after a step."""

    def __init__(self, folder: Path, save: Callable[[int], Path]) -> None:
        self._path, self._save = folder / WISH, save

    def fulfil(self, step: int) -> None:
        if self._path.exists():
            try:
                self._save(step)
            except (SpectralAdapterError, OSError) as error:  # the training matters more
                logging.warning("the adapter of step %d could not be kept: %s", step, error)
            finally:
                with contextlib.suppress(OSError):
                    self._path.unlink()


def send(event: str, values: dict[str, Any]) -> None:
    """To every page; nothing where no server runs."""
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None:
        instance.send_sync(event, values)


def memory() -> int | None:
    """Bytes that PyTorch holds on the GPU; None without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else None
