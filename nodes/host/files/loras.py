"""Ordinary LoRAs as adapters: from the host's folders, or straight from its trainer (``LORA_MODEL``).

With a MODEL or CLIP the host's own map of names is asked, so that layers of families that this pack has no
table for get the host's weight names, and convolutions that the host's trainer has flattened their kernels.

Shapes: down (r, in, *kernel) from (r, in · Π kernel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter, AdapterLayer
from ....spectral_core.attach.targets import layer_shape
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.files import lora_import
from ....spectral_core.maths.layers import LayerShape
from ....spectral_core.names.spellings import KOHYA_PART, NATIVE_PART
from . import parsed_cache as store
from . import paths

_CONVOLUTIONS = (
    ".conv1",
    ".conv2",
    ".conv",
    ".conv_in",
    ".conv_out",
    ".conv_shortcut",
    ".proj_in",
    ".proj_out",
)
_FOREIGN = (f"{KOHYA_PART}.", f"{NATIVE_PART}.")


@dataclass(frozen=True)
class OpenedLoRA:
    """A LoRA as an adapter, where it came from, and what the user should know about it."""

    title: str
    adapter: Adapter
    notes: tuple[str, ...] = ()
    held: Any = (
        None  # the file as it was read: whoever opened it holds on to it, so that it is not read again
    )


def open_lora(name: str, lora_model: Any, model: Any, clip: Any) -> OpenedLoRA:
    """The connected LORA_MODEL, or else the file of this name.

    Raises SpectralAdapterError where there is neither, for other kinds of adapters, and as the file demands.
    """
    if lora_model is not None:
        title, read = "LORA_MODEL", _from_memory(lora_model, model is not None)
    elif name == paths.NO_LORA:
        raise SpectralAdapterError("no LoRA is chosen: choose a file, or connect a LORA_MODEL to lora_model")
    else:
        found = paths.resolve(name, paths.LORAS)
        read = store.ADAPTERS.get(
            "lora", found.path, lambda: lora_import.read_lora(found.path, drop_differences=True)
        )
        title = "\n".join(part for part in (found.path.name, found.note) if part)
    adapter, notes = read.adapter, list(read.notes)
    if model is not None or clip is not None:
        adapter, renamed = _fitted(adapter, model, clip)
        notes += [f"{renamed} layers were named after the connected model's weights"] if renamed else []
    elif lora_model is not None:
        _refuse_flattened(adapter)
    if read.unmatched:
        some = ", ".join(read.unmatched[:3])
        notes.append(f"{len(read.unmatched)} tensors belong to no layer and were left out, such as {some}")
    return OpenedLoRA(title, adapter, tuple(notes), read)


def _from_memory(lora_model: Any, keep_names: bool) -> lora_import.ImportedLoRA:
    is_table = isinstance(lora_model, Mapping) and all(isinstance(v, Tensor) for v in lora_model.values())
    if not is_table or not lora_model:
        raise SpectralAdapterError(
            f"lora_model is a {type(lora_model).__name__}: expected the host's LORA_MODEL, a table of "
            "tensors; connect Train LoRA"
        )
    return lora_import.lora_from_tensors(lora_model, "LORA_MODEL", keep_names=keep_names)


def _refuse_flattened(adapter: Adapter) -> None:
    """The host's trainer keeps no kernels: without the model nobody can tell a convolution's."""
    flat = [n for n, layer in adapter.layers.items() if n.endswith(_CONVOLUTIONS) and not layer.shape.kernel]
    if flat:
        raise SpectralAdapterError(
            f"LORA_MODEL: layer {flat[0]} and {len(flat) - 1} more are convolutions whose kernels the host's "
            "trainer does not keep: connect the model that the LoRA was trained on to 'model'"
        )


def _fitted(adapter: Adapter, model: Any, clip: Any) -> tuple[Adapter, int]:
    """The adapter with names that this model understands and kernels where they were flattened.

    Layers under the host's own names get this pack's where there is one, so that they fuse with other
    adapters; layers under a LoRA file's names get the host's.
    """
    from ..model import compat
    from ..model import places as keys

    maps = []
    named: dict[str, str] = {}
    if model is not None:
        maps.append((model.model, compat.model_keys(model)))
        named = keys.unet_names(maps[0][1])
    if clip is not None:
        maps.append((clip.patcher.model, compat.clip_keys(clip)))
    layers: dict[str, AdapterLayer] = {}
    renamed = 0
    for name, layer in adapter.layers.items():
        for root, known in maps:
            value = next((known[c] for c in keys.candidates(name) if c in known), None)
            if value is None:
                continue
            key, offset = (value, None) if isinstance(value, str) else (value[0], value[1])
            path = key.removesuffix(".weight")
            layer = _with_kernel(layer, layer_shape(keys.module_at(root, path)), offset)
            rows = "" if offset is None else f"[{offset[1]}:{offset[1] + offset[2]}]"
            better = named.get(key, path) if offset is None else f"{path}{rows}"
            if name.startswith(_FOREIGN) and better != name and better not in adapter.layers:
                name, renamed = better, renamed + 1
            break
        layers[name] = layer
    return replace(adapter, layers=layers), renamed


def _with_kernel(layer: AdapterLayer, host: LayerShape | None, offset: Any) -> AdapterLayer:
    shape = layer.shape
    is_flattened = (
        host is not None
        and offset is None
        and host.kernel
        and not shape.kernel
        and host.in_features * math.prod(host.kernel) == shape.in_features
    )
    if not is_flattened or host is None:
        return layer
    inner = (host.in_features, *host.kernel)
    terms = tuple(
        replace(term, params={**term.params, "down": term.params["down"].reshape(-1, *inner)})
        for term in layer.terms
    )
    return AdapterLayer(LayerShape(shape.out_features, *inner[:1], host.kernel), terms)
