"""Opening what commands name: a model on a device, an adapter or LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..errors import SpectralAdapterError
from ..files.adapter_file import is_adapter_file, load
from ..files.lora_import import read_lora
from ..names.layer_name import LayerName
from ..names.spellings import path_spellings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_model(path: str | Path, dtype: str, device: torch.device | str | None) -> Any:
    """A diffusers pipeline on a device; None is a GPU where there is one."""
    from ..pipelines.loading import load_pipeline, quiet_libraries

    quiet_libraries()
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise SpectralAdapterError(f"device {device!r}: expected cpu, cuda or cuda:<n>") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise SpectralAdapterError(f"device {device!r}: this torch sees no GPU; use cpu")
    return load_pipeline(path, DTYPES[dtype]).to(where)


def open_adapter(path: str | Path, pipe: Any = None, lazy: bool = False) -> Adapter:
    """An adapter of this project, or a LoRA file as one. pipe: where a compact file finds its base
    weights. lazy: see :func:`..files.adapter_file.read`."""
    path = Path(path)
    if is_adapter_file(path):
        return load(path, None if pipe is None else lambda name: _weight(pipe, name), lazy)
    read = read_lora(path)
    left_out = f"{len(read.unmatched)} tensors belong to no layer and were left out, such as "
    for note in (*read.notes, *([left_out + ", ".join(read.unmatched[:3])] if read.unmatched else [])):
        print(f"{path.name}: {note}")
    return read.adapter


def _weight(pipe: Any, name: str) -> Tensor:
    """A layer's weight in a pipeline."""
    from ..pipelines.loading import parts_of

    parsed = LayerName.parse(name)
    modules = dict(parts_of(pipe)[parsed.part].named_modules())
    for path in path_spellings(parsed.path):
        if path in modules:
            weight: Tensor = modules[path].weight.detach()
            return weight
    raise SpectralAdapterError(f"layer {name}: this model has no such layer")
