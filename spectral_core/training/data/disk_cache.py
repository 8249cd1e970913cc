"""Latents and text embeddings on disk, so that a run does not compute them again. One safetensors file each.

The name of an entry is the SHA-256 of everything it depends on: the picture's bytes, its size, the weights of
the autoencoder; the caption, the weights of the text encoders. A damaged entry is computed anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SpectralAdapterError
from ...files import writing as safewrite
from ...files.container import open_safely


class TensorCache:
    """Tensors by name under a key. A folder that cannot be written costs speed only; None caches nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.hits = 0
        self.misses = 0

    def get_or_compute(self, key: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of the key, on the CPU."""
        path = None if self.folder is None else self.folder / f"{key}.safetensors"
        if path is not None and path.is_file():
            try:
                found = open_safely(path).read()
            except SpectralAdapterError:
                pass  # damaged: overwritten below
            else:
                self.hits += 1
                return found
        self.misses += 1
        made = {name: tensor.detach().cpu() for name, tensor in compute().items()}
        if path is not None:
            self._write(path, made)
        return made

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            safewrite.write(tensors, {}, path, overwrite=True)
        except (OSError, SpectralAdapterError):
            self.folder = None  # full or forbidden: go on without


def key_of(**parts: Any) -> str:
    """The key of a cache entry: of JSON-able parts, bytes as their digests."""
    plain = {k: hashlib.sha256(v).hexdigest() if isinstance(v, bytes) else v for k, v in parts.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def digest_of_module(module: nn.Module) -> str:
    """SHA-256 over a module's weights: names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
