"""What the adaptive gates did in the last sampling run, by adapter, for the report nodes.

A report node has the adapter and not the model that carried it, so the records are found by the content of
the adapter's layers: strengths, schedules and names do not matter.

Shapes: those of :mod:`spectral_core.gates.record`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.gates.record import GateRecorder
from . import folded_cache as factors

_KEPT = 16
_WAITING = 50_000  # passes of one layer each, some ten bytes

# For the whole process on purpose: the sampler fills it, another node reads it.
_RECORDS: OrderedDict[tuple[str, str], GateRecorder] = OrderedDict()


class _Recorder(GateRecorder):
    """A recorder that counts when it is asked, not between two steps, and that ``torch.compile`` does not
    see: its lists would make it compile at every step.
    """

    def record(self, layer: str, is_open: Tensor, progress: float | Tensor | None) -> None:
        if torch.compiler.is_compiling():
            return
        self._waiting.append((layer, is_open, progress))
        if len(self._waiting) >= _WAITING:
            self._fetch()


def key_of(adapter: Adapter) -> str:
    """A hash of an adapter's layers: equal for the same adapter at any strength."""
    text = "".join(f"{name}={factors.digest(adapter.layers[name])};" for name in sorted(adapter.layers))
    return hashlib.sha256(text.encode()).hexdigest()


def of(adapter: Adapter) -> GateRecorder | None:
    """What its gates did in the last sampling run, text encoders included; None if none has run."""
    key = key_of(adapter)
    found = [record for (owner, _), record in _RECORDS.items() if owner == key]
    if not found:
        return None
    joined = GateRecorder()
    for record in found:
        joined.merge(record)
    return joined


def start(key: str, side: str) -> GateRecorder:
    """A new, empty record for the MODEL or CLIP of an adapter in place of the last one.

    The oldest of all goes when there are too many.
    """
    _RECORDS.pop((key, side), None)
    record = _RECORDS[key, side] = _Recorder()
    while len(_RECORDS) > _KEPT:
        _RECORDS.popitem(last=False)
    return record
