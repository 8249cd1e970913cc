"""Writing the safetensors container: atomically, and the same bytes for the same content."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import SpectralAdapterError
from ..whole_file import whole_file
from .container import DTYPES, MAX_HEADER

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Later:
    """A tensor that is made when its turn to be written comes: a file of many takes the memory of one."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    tensors: Mapping[str, Tensor | Later],
    metadata: Mapping[str, str],
    path: str | os.PathLike[str],
    overwrite: bool = False,
) -> Path:
    """Write a safetensors file atomically: it appears whole, or not at all.

    Same content, same bytes. Raises SpectralAdapterError when the file is there and ``overwrite`` is not set
    (it names a free name), when the folder is missing or cannot be written, when the disk is full; nothing is
    left behind then.
    """
    path = Path(path)
    check_target(path, overwrite)
    try:
        with whole_file(path, overwrite) as stream:
            _write_to(stream, tensors, metadata)
    except FileExistsError:
        raise SpectralAdapterError(
            f"{path}: was created by another program meanwhile; nothing was saved"
        ) from None
    except OSError as error:
        raise SpectralAdapterError(
            f"{path}: cannot be written ({error.strerror or error}); nothing was saved"
        ) from error
    return path


def check_target(path: Path, overwrite: bool = False) -> None:
    """Raise SpectralAdapterError where :func:`write` would refuse the name: to ask before long work."""
    if path.suffix != ".safetensors":
        raise SpectralAdapterError(f"{path}: expected a name that ends in .safetensors")
    if path.is_dir() or not path.parent.is_dir():
        raise SpectralAdapterError(
            f"{path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}"
        )
    if path.exists() and not overwrite:
        raise SpectralAdapterError(
            f"{path}: exists already; save as {free_name(path).name}, or allow overwriting"
        )


def free_name(path: Path) -> Path:
    """The first of name-2, name-3, … that is not there yet."""
    number = 2
    while (candidate := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return candidate


def _write_to(stream: BinaryIO, tensors: Mapping[str, Tensor | Later], metadata: Mapping[str, str]) -> None:
    """Wide types first, then by name, so that every tensor starts at a multiple of its item size."""
    assert "__metadata__" not in tensors
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    position = 0
    for name in order:
        tensor = tensors[name]
        stop = position + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    try:
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise SpectralAdapterError(
            f"{error.object!r:.80}: cannot be written as UTF-8 ({error.reason})"
        ) from error
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise SpectralAdapterError(
            f"the header would have {len(raw)} bytes, allowed are {MAX_HEADER}: shorten the metadata"
        )
    stream.write(len(raw).to_bytes(8, "little") + raw)
    for name in order:
        if tensors[name].nbytes:
            stream.write(_made(name, tensors[name]).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _made(name: str, tensor: Tensor | Later) -> Tensor:
    """The tensor on the CPU, and as it was announced."""
    found = tensor.make() if isinstance(tensor, Later) else tensor
    if found.dtype != tensor.dtype or tuple(found.shape) != tuple(tensor.shape):
        raise SpectralAdapterError(
            f"tensor {name!r} is {found.dtype} {tuple(found.shape)} now, and was {tensor.dtype} "
            f"{tuple(tensor.shape)} before: it changed while it was saved"
        )
    return found.detach().cpu()
