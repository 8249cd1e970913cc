"""A lock file that the operating system releases when its holder ends, however it ends.

Shapes: none.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import IO, Any

from ...errors import SpectralAdapterError


class FileLock:
    """An exclusive lock on a file, a context manager. The file stays behind, empty, and means nothing by
    itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[Any] | None = None

    def try_acquire(self) -> bool:
        """Take the lock; False where another holds it."""
        assert self._file is None, "taken already"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b")
        except OSError as error:
            raise SpectralAdapterError(
                f"{self.path}: cannot be written ({error.strerror or error}); choose a folder that can"
            ) from error
        if not _lock(file):
            file.close()
            return False
        self._file = file
        return True

    def acquire(self, seconds: float = 60.0) -> None:
        """Take the lock, waiting for it; SpectralAdapterError when it stays taken for so long."""
        until = time.monotonic() + seconds
        while not self.try_acquire():
            if time.monotonic() > until:
                raise SpectralAdapterError(
                    f"{self.path}: another program has held this lock for {seconds:.0f} s; end it, or try "
                    "later"
                )
            time.sleep(0.05)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()  # which unlocks
            self._file = None

    def __enter__(self) -> FileLock:
        if self._file is None:
            self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def remove(self) -> None:
        """Release it and take the file away (where nobody else has it open)."""
        self.release()
        with contextlib.suppress(OSError):
            self.path.unlink()


def _lock(file: IO[Any]) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
