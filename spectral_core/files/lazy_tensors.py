"""A file's tensors read anew each time they are asked for, so that many adapters take the memory of one
layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..errors import SpectralAdapterError
from .container import SafeFile, open_safely


class _Named(Mapping[str, Tensor]):
    """Tensors of these names, read when they are asked for."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class FileTensors(_Named):
    """One state of a file. ``check`` complains about a tensor, by its name, whose numbers cannot be used."""

    def __init__(self, file: SafeFile, names: Iterable[str], check: Callable[[str, Tensor], None]) -> None:
        super().__init__(names)
        self._file, self._check, self._state = file, check, _state(file.path)

    def __getitem__(self, name: str) -> Tensor:
        """Raises SpectralAdapterError where the file is another one by now, and as ``check`` does."""
        if name not in self._names:
            raise KeyError(name)
        if _state(self._file.path) != self._state:
            raise SpectralAdapterError(
                f"{self._file.path}: the file has changed since the adapter was loaded from it, and {name} "
                "is needed now: load it again, so that all of it is of one state"
            )
        tensor = self._file.read([name])[name]
        self._check(name, tensor)
        return tensor


def whole_file(path: Path) -> FileTensors:
    """Every tensor of a file as it is now, for those who have checked them."""
    file = open_safely(path)
    return FileTensors(file, file.entries, lambda name, tensor: None)


class LazyParams(_Named):
    """A term's tensors by name; nothing is kept of what was read."""

    is_immutable = True  # :class:`..adapter.adapter.Term` keeps it instead of a copy

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, names: Iterable[str]) -> None:
        super().__init__(names)
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[self._prefix + name]


def _state(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise SpectralAdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    return found.st_ino, found.st_size, found.st_mtime_ns
