"""Parsed files, kept while they do not change: a file is known by path, time of change and size."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.files.reading import refuse_special

KEPT = 256  # values that a store keeps alive


@dataclass(frozen=True)
class Stamp:
    """What tells one state of a file from another without reading it."""

    path: str
    changed_ns: int
    size: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Raises SpectralAdapterError where the file is gone."""
        try:
            state = path.stat()
        except OSError as error:
            raise SpectralAdapterError(
                f"{path}: cannot be read ({error.strerror or error}); was it moved or deleted?"
            ) from error
        return cls(str(path), state.st_mtime_ns, state.st_size)

    def __str__(self) -> str:
        return f"{self.path}|{self.changed_ns}|{self.size}"


class Store:
    """Values parsed from files, the least recently used dropped first.

    keeps_alive: False for what is large. It is then given out for as long as someone else holds it: a node
    does, as the host's own Load LoRA does, until the host drops the node.

    A value may belong to models as well (a compact adapter was completed with one): it is then only given
    out for the very same models, which are not kept alive.
    """

    def __init__(self, keeps_alive: bool = True, kept: int = KEPT) -> None:
        self._keeps_alive, self._kept = keeps_alive, kept
        self._values: OrderedDict[tuple[Any, ...], tuple[Callable[[], Any], tuple[Any, ...]]] = OrderedDict()

    def get(self, kind: str, path: Path, parse: Callable[[], Any], owners: Sequence[Any] = ()) -> Any:
        """``parse()``, or what it gave for this state of the file; again where it was written meanwhile."""
        stamp = Stamp.of(path)
        while True:
            key = (stamp.path, kind, *map(id, owners))
            kept, refs = self._values.get((key, stamp), (None, ()))
            value = kept and kept()
            if value is not None and all(ref() is owner for ref, owner in zip(refs, owners, strict=True)):
                self._values.move_to_end((key, stamp))
                return value
            value = parse()
            after = Stamp.of(path)
            if after == stamp:
                self._keep(key, stamp, value, owners)
                return value
            stamp = after

    def _keep(self, key: tuple[Any, ...], stamp: Stamp, value: Any, owners: Sequence[Any]) -> None:
        for old in [known for known in self._values if known[0] == key]:
            del self._values[old]
        held = (lambda: value) if self._keeps_alive else weakref.ref(value)
        self._values[key, stamp] = (held, tuple(weakref.ref(owner) for owner in owners))
        while len(self._values) > self._kept:
            self._values.popitem(last=False)


# For the whole process on purpose: nodes are made anew for every workflow, and files outlive them. Headers
# are small and stay; adapters are shared while any node holds them.
HEADERS = Store()
ADAPTERS = Store(keeps_alive=False)


# For the whole process on purpose, as above: a file's hash is computed once for each of its states.
_DIGESTS: OrderedDict[Stamp, str] = OrderedDict()
_KEPT_DIGESTS = 4096


def digest(path: Path, interrupted: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file, read only where this state of it has not been read before.

    This takes seconds for a large file: never on the server's event loop. ``interrupted`` is called between
    blocks and may raise.
    """
    stamp = Stamp.of(path)
    if stamp not in _DIGESTS:
        refuse_special(path)
        _DIGESTS[stamp] = _sha256(stamp.path, interrupted)
        while len(_DIGESTS) > _KEPT_DIGESTS:
            _DIGESTS.popitem(last=False)
    return _DIGESTS[stamp]


def known_digest(path: Path) -> str:
    """The same, without reading the file; empty where it is not known yet."""
    return _DIGESTS.get(Stamp.of(path), "")


def _sha256(path: str, interrupted: Callable[[], None]) -> str:
    hashed = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                interrupted()
                hashed.update(block)
    except OSError as error:
        raise SpectralAdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    return hashed.hexdigest()
