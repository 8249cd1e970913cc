"""The base model's own weights by an adapter's layer names, whatever is patched into the loaded model.

Shapes: each weight as its layer's shape says, float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter, AdapterLayer
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.maths.layers import LayerShape
from . import compat
from . import places as keys


def owner(connected: Any) -> Any | None:
    """The model itself behind a MODEL or CLIP, the same for all its clones; None where none is connected."""
    if connected is None:
        return None
    return getattr(connected, "cond_stage_model", None) or connected.model


def source(shapes: Mapping[str, LayerShape], model: Any, clip: Any) -> Callable[[str], Tensor]:
    """layer name -> weight, found through the host's maps, read only when asked for.

    Raises SpectralAdapterError for layers of another shape, and when asked for a layer that is not there.
    """
    places = keys.place(
        Adapter({name: AdapterLayer(shape, ()) for name, shape in shapes.items()}), model, clip
    )
    by_name = {place.name: (model, place) for place in places.model}
    by_name |= {place.name: (clip.patcher, place) for place in places.clip}

    def weight(name: str) -> Tensor:
        if name not in by_name:
            why = places.unmatched.get(name, "the input it belongs to is not connected")
            raise SpectralAdapterError(f"layer {name}: its weight is needed and was not found: {why}")
        patcher, place = by_name[name]
        whole = compat.original_weight(patcher, place.key, torch.device("cpu"))
        if place.function is not None:
            raise SpectralAdapterError(
                f"layer {name}: the host stores {place.key} in another form, so that its own values cannot "
                "be read; save the adapter without 'compact'"
            )
        return whole if place.offset is None else whole.narrow(*place.offset).clone()

    return weight


def available(adapter: Adapter, model: Any, clip: Any = None) -> dict[str, Tensor]:
    """The weights of those layers of an adapter that MODEL and CLIP have; the others are left out."""
    shapes = {name: layer.shape for name, layer in adapter.layers.items()}
    places = keys.place(Adapter({n: AdapterLayer(s, ()) for n, s in shapes.items()}), model, clip)
    weight = source(shapes, model, clip)
    return {p.name: weight(p.name) for p in (*places.model, *places.clip) if p.function is None}
