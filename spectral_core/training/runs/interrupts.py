"""Ctrl-C that waits until a step of the optimiser is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def after_the_block() -> Iterator[None]:
    """Ctrl-C, or a SIGTERM that somebody handles, inside the block takes effect behind it. Elsewhere than in
    the main thread Python delivers none, and this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    waiting: list[int] = []
    for number in handled:
        signal.signal(number, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
    if waiting:
        signal.raise_signal(waiting[0])
