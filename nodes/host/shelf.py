"""The tensors of an adapter's file, held until they are folded and read again from the file when asked for.

A folded layer is about as large as its tensors, and while pictures are made nobody looks at these: fusing,
saving, reports and another base do. So that an adapter is held once and not twice, folding sets them down.

Shapes: those of the file's tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...spectral_core import file_checks
from ...spectral_core.adapter import Adapter, Term
from ...spectral_core.errors import SpectralAdapterError
from ...spectral_core.safefile import SafeFile, open_safely
from .store import Stamp

_KEPT_BYTES = 256  # tensors of this size stay


class Volume:
    """One state of a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, Stamp.of(path)
        self._file: SafeFile | None = None

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the file. Raises SpectralAdapterError where the file is another one now."""
        if Stamp.of(self.path) != self.stamp:
            raise SpectralAdapterError(
                f"{self.path}: the file has changed since this adapter was loaded from it, and {name} is "
                "needed again: run the node that loads it again, so that all of it is of one state"
            )
        if self._file is None:
            self._file = open_safely(self.path)
        return self._file.read([name])[name]


class Shelf(Mapping[str, Tensor]):
    """A term's tensors by name. Immutable to those who use it: a tensor has one value at any time."""

    is_immutable = True  # :class:`Term` keeps it instead of a copy

    def __init__(self, volume: Volume, prefix: str, params: Mapping[str, Tensor]) -> None:
        self._volume, self._prefix = volume, prefix
        self._held: dict[str, Tensor] = dict(params)
        self._lent: dict[str, weakref.ref[Tensor]] = {}
        self._names = tuple(params)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._held:
            return self._held[name]
        if name not in self._names:
            raise KeyError(name)
        lent = self._lent.get(name)
        found = None if lent is None else lent()  # one tensor for all who use it at the same time
        if found is None:
            found = self._volume.read(self._prefix + name)
            self._lent[name] = weakref.ref(found)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def set_down(self) -> None:
        """Hold only gates, which pictures are made with, and what is small from here on."""
        for name, tensor in list(self._held.items()):
            if tensor.nbytes > _KEPT_BYTES and not name.startswith("gate."):
                self._lent[name] = weakref.ref(tensor)
                del self._held[name]


def shelved(adapter: Adapter, volume: Volume) -> Adapter:
    """The same adapter, as it was read from this file, with its tensors on shelves."""
    layers = {}
    for name, layer in adapter.layers.items():
        terms = []
        for k, term in enumerate(layer.terms):
            prefix = file_checks.prefix(name, k, len(layer.terms))
            terms.append(replace(term, params=Shelf(volume, prefix, term.params)))
        layers[name] = replace(layer, terms=tuple(terms))
    return replace(adapter, layers=layers)


def set_down(term: Term) -> None:
    """The term's folded factors are kept from here on; its tensors need not be."""
    if isinstance(term.params, Shelf):
        term.params.set_down()
