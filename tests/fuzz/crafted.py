"""Safetensors files whose header is whatever a test wants, sound or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_core.adapter.adapter import Adapter, AdapterLayer, Provenance, Term
from spectral_core.files.adapter_file import CONFIG_KEY
from spectral_core.files.container import DTYPES
from spectral_core.maths.layers import LayerShape
from spectral_core.methods import METHODS, LoRAConfig, MethodConfig

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def raw(header: bytes, data: bytes, path: Path) -> Path:
    """The container around these bytes."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> Path:
    """A sound container of any tensors and words, lone surrogates among them."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        piece = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        place = [len(data), len(data) + len(piece)]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        data += piece
    return raw(json.dumps(header).encode(), data, path)


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def edited(path: Path, **changes: Any) -> Path:
    """An adapter's file with other entries in its configuration."""
    header, data = parts(path)
    config = json.loads(header["__metadata__"][CONFIG_KEY])
    config.update(changes)
    header["__metadata__"][CONFIG_KEY] = json.dumps(config)
    return raw(json.dumps(header).encode(), data, path)


def adapter(config: MethodConfig | None = None, layers: int = 2, size: int = 8) -> Adapter:
    """Small layers of random numbers."""
    config = config or LoRAConfig(2, 4.0)
    generator = torch.Generator().manual_seed(1)
    shape = LayerShape(size, size + 2)
    made = {}
    for i in range(layers):
        params = {
            key: torch.rand(wanted, generator=generator) * 0.5
            for key, wanted in METHODS[config.method].tensor_shapes(config, shape).items()
        }
        if "gate.mask" in params:
            params["gate.mask"] = torch.ones_like(params["gate.mask"])
        made[f"unet.down_blocks.{i}.attentions.0.to_q"] = AdapterLayer(shape, (Term(config, params),))
    return Adapter(made, Provenance("small", "sd1"))
