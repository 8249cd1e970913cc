"""Files that somebody else has put there: only ordinary ones are opened, small ones read up to a bound.

Opening a named pipe waits until somebody writes into it, a device may never end, and a sparse file claims
more than the disk holds. All of that is asked first.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from ..errors import SpectralAdapterError

MAX_SMALL = 16 << 20  # bytes of a settings file, a caption, a record


def refuse_special(path: Path) -> None:
    """Raise SpectralAdapterError for what is no ordinary file: a pipe, a socket, a device. Opens nothing."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise SpectralAdapterError(f"{str(path)!r:.300}: cannot be read ({_why(error)})") from error
    if not stat.S_ISREG(mode):
        kind = next((word for test, word in _KINDS if test(mode)), "something else")
        raise SpectralAdapterError(f"{path}: is {kind}, expected an ordinary file")


_KINDS: tuple[tuple[Any, str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_bytes(path: Path, most: int = MAX_SMALL) -> bytes:
    """A small ordinary file. Raises SpectralAdapterError where it is none, larger than ``most`` bytes, or
    cannot be read."""
    refuse_special(path)
    try:
        with path.open("rb") as stream:
            found = stream.read(most + 1)
    except OSError as error:
        raise SpectralAdapterError(f"{path}: cannot be read ({_why(error)})") from error
    if len(found) > most:
        raise SpectralAdapterError(f"{path}: more than {most} bytes")
    return found


def read_text(path: Path, most: int = MAX_SMALL) -> str:
    """The same as text. Raises also where it is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpectralAdapterError(f"{path}: not UTF-8 text; save it as UTF-8") from error


def refuse_more_than_memory(path: Path, wanted: int) -> None:
    """Raise SpectralAdapterError where ``wanted`` bytes of a file would not fit into the free memory."""
    free = _free_memory()
    if free is not None and wanted > free:
        raise SpectralAdapterError(
            f"{path}: {wanted / 2**30:.1f} GiB are to be read, and {free / 2**30:.1f} GiB of memory "
            "are free: is it really an adapter?"
        )


def _free_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", "rb") as stream:
            found = next(line for line in stream if line.startswith(b"MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
