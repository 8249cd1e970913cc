"""A disk that loses what was not synced: what a power cut may leave, for every moment in which it may come.

While it is recording, syncs and changes of names are counted, and what they make durable is noted: a file's
content when the file is synced, a folder's names when the folder is synced. A cut before operation k leaves
the synced content under the synced names; of the changes of names since, any first few, in their order, as
journals of file systems keep them. A file that was never synced is there with nothing in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class PowerCut(BaseException):
    """The machine is off: nothing that comes afterwards reaches the disk."""


class Disk:
    """Records one folder, without those below it. ``cut_before``: the operation that is not done any more."""

    def __init__(self, folder: Path, cut_before: int | None = None) -> None:
        self.folder, self.cut_before, self.operations, self.is_off = folder, cut_before, 0, False
        self.names: dict[str, int] = {}  # durable: name -> file
        self.contents: dict[int, bytes] = {}  # durable: file -> content
        self.pending: list[tuple[str, int | None]] = []  # name -> file, or gone; not durable yet
        self._held: list[int] = []  # so that no file's number is given away again

    def _step(self) -> None:
        if self.cut_before is not None and self.operations >= self.cut_before:
            self.is_off = True
        if self.is_off:
            raise PowerCut
        self.operations += 1

    def _number(self, path: Path) -> int:
        self._held.append(os.open(path, os.O_RDONLY))
        return os.fstat(self._held[-1]).st_ino

    def _is_here(self, path: Any) -> bool:
        return Path(path).parent == self.folder

    @contextmanager
    def recording(self) -> Iterator[Disk]:
        sync, replace, unlink, link = os.fsync, os.replace, os.unlink, os.link

        def synced(handle: int) -> None:
            found = os.fstat(handle)
            place = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if place == self.folder:
                self._step()
                files = [each for each in self.folder.iterdir() if each.is_file()]
                self.names = {each.name: self._number(each) for each in files}
                self.pending.clear()
            elif stat.S_ISREG(found.st_mode) and self._is_here(place):
                self._step()
                self._number(place)
                self.contents[found.st_ino] = place.read_bytes()
            sync(handle)

        def named(do: Callable[..., None]) -> Callable[..., None]:
            def change(old: Any, new: Any, **more: Any) -> None:
                if self._is_here(new):
                    self._step()
                    self.pending.append((Path(new).name, self._number(old)))
                    if do is replace:
                        self.pending.append((Path(old).name, None))
                do(old, new, **more)

            return change

        def removed(path: Any, **more: Any) -> None:
            if self._is_here(path) and Path(path).exists():
                self._step()
                self.pending.append((Path(path).name, None))
            unlink(path, **more)

        os.fsync, os.replace, os.unlink, os.link = synced, named(replace), removed, named(link)
        try:
            yield self
        finally:
            os.fsync, os.replace, os.unlink, os.link = sync, replace, unlink, link

    def after_the_cut(self, into: Path) -> Iterator[Path]:
        """Folders as the next start may find them."""
        for count in range(len(self.pending) + 1):
            names = dict(self.names)
            for name, number in self.pending[:count]:
                if number is None:
                    names.pop(name, None)
                else:
                    names[name] = number
            place = into / str(count)
            place.mkdir(parents=True)
            for name, number in names.items():
                (place / name).write_bytes(self.contents.get(number, b""))
            yield place
            shutil.rmtree(place)

    def close(self) -> None:
        for handle in self._held:
            with contextlib.suppress(OSError):
                os.close(handle)
