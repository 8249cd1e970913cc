"""Ctrl-C that waits until a step of the optimiser is whole.

Shapes: none.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def after_the_block() -> Iterator[None]:
    """An interrupt inside the block raises KeyboardInterrupt behind it. Elsewhere than in the main thread
    Python delivers none, and this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is None or before in (signal.SIG_IGN, signal.SIG_DFL):
        yield
        return
    waiting: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        signal.raise_signal(signal.SIGINT)
