"""Statistics in a safetensors file, read layer by layer: a fusion then holds one layer's at a time.

A tensor that several layers share is written once. The metadata ``spectral_statistics`` is one JSON: for each
layer its count and the names of its tensors.

Shapes: as in :mod:`.moments`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import SpectralAdapterError
from ..files.container import SafeFile, open_safely
from ..files.writing import write
from .moments import GatedRows, Statistics

KEY = "spectral_statistics"
VERSION = 1
_GATED = ("cross", "energy", "mean_open")


def save(statistics: Mapping[str, Statistics], path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Write layer name -> statistics, atomically."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def put(tensor: Tensor) -> str:
        if id(tensor) not in names:
            names[id(tensor)] = f"t{len(names)}"
            tensors[names[id(tensor)]] = tensor
        return names[id(tensor)]

    layers: dict[str, Any] = {}
    for name, found in statistics.items():
        entry: dict[str, Any] = {"count": found.count, "moment": put(found.second_moment)}
        if found.basis is not None:
            entry["basis"] = put(found.basis)
        if found.gated is not None:
            entry |= {key: put(getattr(found.gated, key)) for key in _GATED}
            entry["gates"] = [list(key) for key in found.gated.keys]
        layers[name] = entry
    head = json.dumps({"version": VERSION, "layers": layers}, separators=(",", ":"), ensure_ascii=False)
    return write(tensors, {KEY: head}, path, overwrite)


def load(path: str | os.PathLike[str]) -> Mapping[str, Statistics]:
    """Layer name -> statistics, each read when it is asked for.

    Raises SpectralAdapterError, with the file's name, for anything but a file that :func:`save` has written.
    """
    opened = open_safely(path)
    if KEY not in opened.metadata:
        raise SpectralAdapterError(f"{path}: a safetensors file that holds no statistics")
    try:
        head = json.loads(opened.metadata[KEY])
        version, layers = head["version"], dict(head["layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise SpectralAdapterError(f"{path}: its statistics cannot be read ({error})") from error
    if version != VERSION:
        raise SpectralAdapterError(f"{path}: statistics of version {version!r}, expected {VERSION}")
    for name, entry in layers.items():
        _check(entry, f"{path}: layer {name}", opened)
    return _Stored(opened, layers)


def _check(entry: Any, where: str, opened: SafeFile) -> None:
    wanted = ["moment", *(["basis"] if "basis" in entry else []), *(_GATED if "gates" in entry else [])]
    missing = [key for key in wanted if entry.get(key) not in opened.entries]
    if missing or not isinstance(entry.get("count"), int):
        raise SpectralAdapterError(f"{where}: {missing[0] if missing else 'count'} is missing: damaged")


class _Stored(Mapping[str, Statistics]):
    """The layers of a file."""

    def __init__(self, opened: SafeFile, layers: Mapping[str, Any]) -> None:
        self._opened, self._layers = opened, layers

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, name: str) -> Statistics:
        entry = self._layers[name]
        read = self._opened.read([entry[k] for k in ("moment", "basis", *_GATED) if k in entry])
        gated = None
        if "gates" in entry:
            keys = tuple((int(a), int(t), int(rows)) for a, t, rows in entry["gates"])
            gated = GatedRows(keys, *(read[entry[key]] for key in _GATED))
        basis = read[entry["basis"]] if "basis" in entry else None
        return Statistics(read[entry["moment"]], entry["count"], basis, gated)
