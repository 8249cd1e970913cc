"""Ordinary LoRAs as adapters: from the host's folders, or straight from its trainer (``LORA_MODEL``).

With a MODEL or CLIP the layers get the names of the host's weights (:mod:`.fitting`).

Shapes: down (r, in, *kernel) from (r, in · Π kernel).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.files import lora_import
from . import metadata, paths
from . import parsed_cache as store

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
        found = paths.resolve(name, paths.LORAS, may_hash=True)
        metadata.file_opened(found.path)
        read = store.ADAPTERS.get(
            "lora", found.path, lambda: lora_import.read_lora(found.path, with_dependent=True)
        )
        title = "\n".join(part for part in (found.path.name, found.note) if part)
    adapter, notes = read.adapter, list(read.notes)
    if model is not None or clip is not None:
        from .fitting import fitted

        adapter, more = fitted(read, model, clip)
        notes += more
    elif read.dependent:
        raise SpectralAdapterError(
            f"{title}: layer {next(iter(read.dependent))} and {len(read.dependent) - 1} more change the "
            "weight they find (DoRA, OFT and the like): connect the model it is for to 'model'"
        )
    elif lora_model is not None:
        _refuse_flattened(adapter)
    if not adapter.layers:
        raise SpectralAdapterError(f"{title}: no layer of the file has a place in the connected model")
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
    return lora_import.lora_from_tensors(lora_model, "LORA_MODEL", keep_names=keep_names, with_dependent=True)


def _refuse_flattened(adapter: Adapter) -> None:
    """The host's trainer keeps no kernels: without the model nobody can tell a convolution's."""
    flat = [n for n, layer in adapter.layers.items() if n.endswith(_CONVOLUTIONS) and not layer.shape.kernel]
    if flat:
        raise SpectralAdapterError(
            f"LORA_MODEL: layer {flat[0]} and {len(flat) - 1} more are convolutions whose kernels the host's "
            "trainer does not keep: connect the model that the LoRA was trained on to 'model'"
        )
