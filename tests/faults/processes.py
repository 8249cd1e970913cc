"""Work in a process of its own, which may be killed, and may be refused what others may do."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spectral_core.errors import SpectralAdapterError


def forked(work: Callable[[], None]) -> int:
    """The process that does it: 0 at its end, 3 for the project's error, 1 for any other, which it prints."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except SpectralAdapterError:
        status = 3
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder that no disk makes slow, where there is one: syncs are called there too, and cost nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def ended(child: int) -> int:
    """The exit code of a forked process; minus the signal's number where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def with_memory(spare: int, work: Callable[[], None]) -> None:
    """Do it in a process that may take ``spare`` bytes more than this one has (Linux)."""
    import resource

    def limited() -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))
        # What earlier tests freed stays with the process, and came on top of ``spare``: it is used up.
        used_up = []
        with suppress(MemoryError):
            while True:
                used_up.append(bytearray(1 << 20))
        resource.setrlimit(resource.RLIMIT_AS, (size + spare, hard))
        work()

    assert ended(forked(limited)) == 0
