"""A lock file that the operating system releases when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import filelock

from ...errors import SpectralAdapterError

_PATIENCE = 0.2  # seconds between two questions


class FileLock:
    """filelock's lock on a file, with our words; a context manager. The file means nothing by itself.

    asked: called while it is waited for; what it raises ends the waiting.
    """

    def __init__(self, path: Path, asked: Callable[[], None] = lambda: None) -> None:
        self.path, self._asked = path, asked
        self._lock = filelock.FileLock(path)

    def try_acquire(self, seconds: float = 0.0) -> bool:
        """Take the lock, waiting so long for it; False where another holds it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=seconds)
        except filelock.Timeout:
            return False
        except OSError as error:
            raise SpectralAdapterError(
                f"{self.path}: cannot be written ({error.strerror or error}); choose a folder that can"
            ) from error
        return True

    def acquire(self, seconds: float = 60.0) -> None:
        """Take the lock, waiting for it; SpectralAdapterError when it stays taken for so long."""
        until = time.monotonic() + seconds
        while not self.try_acquire(min(_PATIENCE, seconds)):
            self._asked()
            if time.monotonic() < until:
                continue
            raise SpectralAdapterError(
                f"{self.path}: another program has held this lock for {seconds:.0f} s; end it, or try later"
            )

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> FileLock:
        if not self._lock.is_locked:
            self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def remove(self) -> None:
        """Release it and take the file away (where nobody else has it open)."""
        self.release()
        with contextlib.suppress(OSError):
            self.path.unlink()
