"""Optional: the host's own Load LoRA takes our files, as plain weight patches.

Off unless ``SPECTRAL_ADAPTERS_IN_LOAD_LORA`` is 1 where the host starts (:mod:`..startup`). Then Save Adapter
writes a file's configuration into a tensor as well, because the host's loader hands on tensors only, and a
class stands in the host's list of adapters that knows such files by it. The patches are the host's own LoRA
patches, so that everything else about them is the host's business. What needs a forward path of ours is lost,
and the log says so: an adaptive gate runs frozen, and schedules and trained words do not act.

Shapes: up (out, R), down (R, in, *kernel).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import comfy.weight_adapter
import torch
from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.files import adapter_file as fileformat
from ....spectral_core.fusion import freeze
from ....spectral_core.names.layer_name import LayerName
from ..model import compat
from ..model import places as keys


class _File:
    """One file as the host loaded it: its layers by every name that the host may call them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        read = fileformat.from_tensors(tensors, "Load LoRA").adapter
        self.adapter: Adapter = freeze(read)
        self.layers: dict[str, str] = {}
        for name in self.adapter.layers:
            if LayerName.parse(name).rows is not None:
                raise SpectralAdapterError(
                    f"Load LoRA: layer {name} is some rows of a fused weight, which only this pack's nodes "
                    "can apply: load the file with Load Spectral Adapter"
                )
            for candidate in keys.candidates(name):
                self.layers.setdefault(candidate, name)
        self.names = {name: {k for k in tensors if k.startswith(f"{name}.")} for name in self.adapter.layers}
        self.rest = {k for k in tensors if k.startswith("tokens.")} | {fileformat.CONFIG_KEY}
        logging.info("spectral adapters: %s", _text(read))

    def patch(self, name: str) -> Any:
        layer = self.adapter.layers[name]
        with torch.inference_mode(False), torch.no_grad():
            factors = layer.factors(self.adapter.strength_of(name))
            up, down = factors.scaled_up().contiguous(), factors.down.contiguous()
        patch = compat.weight_patch(up, down)
        patch.loaded_keys = self.names[name] | self.rest
        return patch


def _text(adapter: Adapter) -> str:
    gates = sum(not layer.mergeable for layer in adapter.layers.values())
    cost = f"; {told}" if (told := adapter.provenance.frozen_gates) else ""
    lost = [f"{gates} adaptive gates run frozen here (Load FouRA lets them adapt{cost})"] if gates else []
    lost += ["its schedule does not act"] if adapter.schedule is not None else []
    lost += ["its trained words do not act"] if adapter.tokens else []
    name = adapter.provenance.name or "an adapter"
    return f"Load LoRA applies {name}, {len(adapter.layers)} layers; {'; '.join(lost) or 'exact'}"


# For the whole process on purpose: the host asks once for each of a model's layers, with the same table.
_LAST: list[tuple[Any, _File]] = []


def _file(tensors: Mapping[str, Tensor]) -> _File:
    marker = tensors[fileformat.CONFIG_KEY]
    if not _LAST or _LAST[0][0]() is not marker:
        _LAST[:] = [(weakref.ref(marker, lambda _: _LAST.clear()), _File(tensors))]
    return _LAST[0][1]


class SpectralFiles(comfy.weight_adapter.WeightAdapterBase):  # type: ignore[misc]
    """Knows our files in the host's list; what it gives are the host's own LoRA patches."""

    name = "spectral_adapters"

    @classmethod
    def load(
        cls, x: str, lora: Mapping[str, Tensor], alpha: Any, dora_scale: Any, loaded_keys: Any = None
    ) -> Any:
        """The patch of the layer that the host calls ``x``, or None where the file has none or is not ours.

        Raises SpectralAdapterError for a file of ours that cannot be applied so.
        """
        if fileformat.CONFIG_KEY not in lora:
            return None
        file = _file(lora)
        name = file.layers.get(x)
        return None if name is None else file.patch(name)


def install() -> None:
    """Put the class into the host's list, once."""
    known = comfy.weight_adapter.adapters
    if not any(getattr(adapter, "name", "") == SpectralFiles.name for adapter in known):
        known.append(SpectralFiles)
