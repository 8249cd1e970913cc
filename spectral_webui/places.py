"""An adapter's layers under the names that the webui's own modules have.

The picture model's blocks are numbered in one row there (``input_blocks.4.1``), so its layers are renamed by
the layout of the very model; a text encoder's modules have the adapter's names. Strengths are multiplied into
the terms, because the patterns that they hang on are for the adapter's own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from spectral_core.adapter.adapter import Adapter, AdapterLayer
from spectral_core.adapter.strengths import is_text_encoder
from spectral_core.errors import SpectralAdapterError
from spectral_core.names import spellings
from spectral_core.names.layer_name import LayerName
from spectral_core.names.unet_blocks import UNetLayout, unet_table

MODEL = "unet"
_NATIVE = (spellings.NATIVE_PART, "transformer", MODEL)


@dataclass(frozen=True)
class Sides:
    """An adapter for each module tree: ``unet`` and the text encoders by part; lost: layer -> why."""

    adapters: Mapping[str, Adapter]
    lost: Mapping[str, str]


def layout_of(unet: nn.Module) -> UNetLayout | None:
    """The layout of a UNet with native names; None for another kind of model."""
    try:
        return UNetLayout.from_native(name for name, _ in unet.named_modules())
    except SpectralAdapterError:
        return None


def sides(adapter: Adapter, layout: UNetLayout | None, text_parts: tuple[str, ...]) -> Sides:
    """The adapter taken apart for the picture's model and the text encoders that the host has.

    Layers of strength 0 are left out, because they are exactly off.
    """
    layers: dict[str, dict[str, AdapterLayer]] = {}
    lost: dict[str, str] = {}
    for name, layer in adapter.layers.items():
        strength = adapter.strength_of(name)
        if strength == 0:
            continue
        side, found = _place(name, layout, text_parts)
        if side:
            layers.setdefault(side, {})[found] = _times(layer, strength)
        else:
            lost[name] = found
    made = {}
    for side, own in layers.items():
        schedule = adapter.schedule if side == MODEL else None  # a text encoder runs once, before all steps
        made[side] = Adapter(own, adapter.provenance, schedule=schedule)
    return Sides(made, lost)


def _place(name: str, layout: UNetLayout | None, text_parts: tuple[str, ...]) -> tuple[str, str]:
    """(the side, the layer's name there), or ("", why there is none)."""
    layer = LayerName.parse(name)
    if is_text_encoder(name):
        if layer.part in text_parts:
            return layer.part, name
        return "", f"this host's model has no text encoder {layer.part!r} that an adapter can be put on"
    if layer.part == "unet" and layout is not None:
        native = unet_table(layout).get(layer.path)
        if native is not None:
            return MODEL, str(LayerName(MODEL, native, layer.rows))
        return "", "this UNet has no such block"
    if layer.part in _NATIVE:
        return MODEL, str(LayerName(MODEL, layer.path, layer.rows))
    return "", "its name cannot be told for this model"


def _times(layer: AdapterLayer, strength: float) -> AdapterLayer:
    if strength == 1:
        return layer
    return replace(layer, terms=tuple(replace(t, weight=t.weight * strength) for t in layer.terms))
