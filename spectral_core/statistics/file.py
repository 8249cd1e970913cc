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

import torch
from torch import Tensor

from ..errors import SpectralAdapterError
from ..files.container import SafeFile, is_count, open_safely, strict_json
from ..files.writing import write
from .moments import GatedRows, Statistics

KEY = "spectral_statistics"
VERSION = 1
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
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
        head = strict_json(opened.metadata[KEY])
        version, layers = head["version"], dict(head["layers"])
    except (SpectralAdapterError, ValueError, KeyError, TypeError) as error:
        raise SpectralAdapterError(f"{path}: its statistics cannot be read ({error})") from error
    if version != VERSION:
        raise SpectralAdapterError(f"{path}: statistics of version {version!r}, expected {VERSION}")
    for name, entry in layers.items():
        _check(entry, f"{path}: layer {name}", opened)
    return _Stored(opened, layers)


def _check(entry: Any, where: str, opened: SafeFile) -> None:
    if not isinstance(entry, dict):
        raise SpectralAdapterError(f"{where}: found {entry!r:.40}, expected a table: damaged")
    wanted = ["moment", *(["basis"] if "basis" in entry else []), *(_GATED if "gates" in entry else [])]
    named = {
        key: name for key in wanted if isinstance(name := entry.get(key), str) and name in opened.entries
    }
    if missing := [key for key in wanted if key not in named]:
        raise SpectralAdapterError(f"{where}: {missing[0]} is missing: damaged")
    if not is_count(entry.get("count")) or entry["count"] < 1:
        raise SpectralAdapterError(
            f"{where}: count {entry.get('count')!r:.40}, expected a whole number of 1 on"
        )
    shapes = {key: opened.entries[name].shape for key, name in named.items()}
    for key, name in named.items():
        if opened.entries[name].dtype not in _FLOATS:
            raise SpectralAdapterError(f"{where}: {key} is {opened.entries[name].dtype}, expected floats")
    _check_shapes(shapes, entry.get("gates"), where)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], gates: Any, where: str) -> None:
    """moment (d, d), basis (d, fan_in), cross (g, d), energy (g, g), mean_open (g,), g the gates' rows."""
    size = shapes["moment"][:1]
    wanted: dict[str, tuple[int, ...]] = {"moment": size * 2}
    if "basis" in shapes:
        wanted["basis"] = size + shapes["basis"][1:2]
    if "cross" in shapes:
        are_gates = isinstance(gates, list) and all(
            isinstance(key, list) and len(key) == 3 and all(map(is_count, key)) for key in gates
        )
        if not are_gates:
            raise SpectralAdapterError(
                f"{where}: gates {gates!r:.60}, expected adapter, term and rows of each"
            )
        rows = (sum(key[2] for key in gates),)
        wanted |= {"cross": rows + size, "energy": rows * 2, "mean_open": rows}
    for key, shape in wanted.items():
        if shapes[key] != shape or not size:
            raise SpectralAdapterError(f"{where}: {key} of shape {shapes[key]}, expected {shape}: damaged")
    if "basis" in shapes and len(shapes["basis"]) != 2:
        raise SpectralAdapterError(f"{where}: basis of shape {shapes['basis']}, expected two sizes: damaged")


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
        wanted = ("moment", *(["basis"] if "basis" in entry else []), *(_GATED if "gates" in entry else []))
        read = self._opened.read(list(dict.fromkeys(entry[key] for key in wanted)))
        for key in wanted:
            if not bool(torch.isfinite(read[entry[key]]).all()):
                raise SpectralAdapterError(
                    f"{self._opened.path}: layer {name}: {key} holds NaN or infinite values: collect the "
                    "statistics again"
                )
        gated = None
        if "gates" in entry:
            keys = tuple((int(a), int(t), int(rows)) for a, t, rows in entry["gates"])
            gated = GatedRows(keys, *(read[entry[key]] for key in _GATED))
        basis = read[entry["basis"]] if "basis" in entry else None
        return Statistics(read[entry["moment"]], entry["count"], basis, gated)
