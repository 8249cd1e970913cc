"""The one writer of files: a file appears whole and lasting, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".part"  # of a file that is being written


@contextmanager
def whole_file(path: Path, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A stream for what ``path`` shall hold. At the block's end the content and the folder's entry are synced
    to the disk and the file has its name; after an error nothing is left behind.

    Raises OSError; FileExistsError where ``overwrite`` is not set and the file has appeared meanwhile.
    """
    temporary = path.parent / f".{path.stem[:40]}-{secrets.token_hex(6)}{SUFFIX}"
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _put(temporary, path, overwrite)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_whole(path: Path, content: bytes | str) -> None:
    """The file with this content (text as UTF-8), as :func:`whole_file`; an existing one is replaced."""
    with whole_file(path) as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)


def _put(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give the finished file its name; without ``overwrite`` also safe against one that has appeared."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links
        if path.exists():
            raise FileExistsError(f"{path}") from error
        os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """So that the name outlives a power cut; Windows has no such thing."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):  # some network file systems refuse
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
