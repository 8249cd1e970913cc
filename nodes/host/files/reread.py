"""The tensors of an adapter's file, held until they are folded and read again from the file when asked for.

A folded layer is about as large as its tensors, and while pictures are made nobody looks at these: fusing,
saving, reports and another base do. So that an adapter is held once and not twice, folding sets them down.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter, Term
from ....spectral_core.files import checks as file_checks
from ....spectral_core.files.lazy_tensors import FileTensors, LazyParams

_KEPT_BYTES = 256  # tensors of this size stay


class Shelf(Mapping[str, Tensor]):
    """A term's tensors by name. Immutable to those who use it: a tensor has one value at any time."""

    is_immutable = True  # :class:`Term` keeps it instead of a copy

    def __init__(self, file: LazyParams, params: Mapping[str, Tensor]) -> None:
        self._file = file
        self._held: dict[str, Tensor] = dict(params)
        self._lent: dict[str, weakref.ref[Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._held:
            return self._held[name]
        lent = self._lent.get(name)
        found = None if lent is None else lent()  # one tensor for all who use it at the same time
        if found is None:
            found = self._file[name]
            self._lent[name] = weakref.ref(found)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def set_down(self) -> None:
        """Hold only gates, which pictures are made with, and what is small from here on."""
        for name, tensor in list(self._held.items()):
            if tensor.nbytes > _KEPT_BYTES and not name.startswith("gate."):
                self._lent[name] = weakref.ref(tensor)
                del self._held[name]


def shelved(adapter: Adapter, file: FileTensors) -> Adapter:
    """The same adapter, as it was read from this state of its file, with its tensors on shelves."""
    layers = {}
    for name, layer in adapter.layers.items():
        terms = []
        for k, term in enumerate(layer.terms):
            prefix = file_checks.prefix(name, k, len(layer.terms))
            again = LazyParams(file, prefix, tuple(term.params))
            terms.append(replace(term, params=Shelf(again, term.params)))
        layers[name] = replace(layer, terms=tuple(terms))
    return replace(adapter, layers=layers)


def set_down(term: Term) -> None:
    """The term's folded factors are kept from here on; its tensors need not be."""
    if isinstance(term.params, Shelf):
        term.params.set_down()
