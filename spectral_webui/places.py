"""An adapter's layers under the names that the webui's own modules have.

The picture model's blocks are numbered in one row there (``input_blocks.4.1``), so its layers are renamed by
the layout of the very model; a text encoder's modules have the adapter's names. Strengths are multiplied into
the terms, because the patterns that they hang on are for the adapter's own names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

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


_FAMILIES = {768: "sd1", 1024: "sd2", 128: "mini"}  # by the width of the text that they attend to


def family_of(unet: nn.Module) -> str:
    """The family of a UNet as adapters name it; empty for another kind of model."""
    layout = layout_of(unet)
    if layout is None:
        return ""
    if layout.label:
        return "sdxl"
    keys = (m for path, m in unet.named_modules() if path.endswith("attn2.to_k"))
    width = getattr(next(keys, None), "in_features", 0)
    return _FAMILIES.get(width, "")


def sides(
    adapter: Adapter,
    layout: UNetLayout | None,
    text_parts: tuple[str, ...],
    known_names: Callable[[], Mapping[str, Any]] = dict,
) -> Sides:
    """The adapter taken apart for the picture's model and the text encoders that the host has.

    known_names: the host's map of names, asked for layers of models other than Stable Diffusion. Layers of
    strength 0 are left out, because they are exactly off.
    """
    names: list[Mapping[str, Any]] = []  # asked once, and only where it is needed

    def known() -> Mapping[str, Any]:
        if not names:
            names.append(known_names())
        return names[0]

    layers: dict[str, dict[str, AdapterLayer]] = {}
    lost: dict[str, str] = {}
    for name, layer in adapter.layers.items():
        strength = adapter.strength_of(name)
        if strength == 0:
            continue
        side, found = _place(name, layout, text_parts, known)
        if side:
            layers.setdefault(side, {})[found] = _times(layer, strength)
        else:
            lost[name] = found
    made = {}
    for side, own in layers.items():
        schedule = adapter.schedule if side == MODEL else None  # a text encoder runs once, before all steps
        made[side] = Adapter(own, adapter.provenance, schedule=schedule)
    return Sides(made, lost)


def _place(
    name: str, layout: UNetLayout | None, text_parts: tuple[str, ...], known: Callable[[], Mapping[str, Any]]
) -> tuple[str, str]:
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
    for spelling in _spellings(layer):
        if (found := known().get(spelling)) is not None:
            return _from_map(layer, found)
    if layer.part in _NATIVE:
        return MODEL, str(LayerName(MODEL, layer.path, layer.rows))
    return "", "its name cannot be told for this model"


def _spellings(layer: LayerName) -> Iterator[str]:
    """The names that a host's map may have for a layer's weight; none for vectors, which maps do not name."""
    if layer.vector is not None or layer.part == spellings.NATIVE_PART:
        return
    if layer.part == spellings.KOHYA_PART:
        yield layer.path
        return
    if layer.part == "unet":
        yield spellings.to_kohya(f"unet.{layer.path}", False)
    yield f"{layer.part}.{layer.path}"


def _from_map(layer: LayerName, found: Any) -> tuple[str, str]:
    """(the side, the layer's name there) of a map's value: a weight, or (weight, (axis, start, length))."""
    key, offset, function = (found, None, None) if isinstance(found, str) else (*found, None, None)[:3]
    path = key.removeprefix(f"{spellings.NATIVE_PART}.").removesuffix(".weight")
    if function is not None or (offset is not None and offset[0] != 0):
        return "", "this host changes what is added to its weight, which only a merged LoRA can follow"
    rows = layer.rows
    if offset is not None:
        start, length = offset[1], offset[2]
        rows = (start, start + length) if rows is None else (start + rows[0], start + rows[1])
    return MODEL, str(LayerName(MODEL, path, rows))


def _times(layer: AdapterLayer, strength: float) -> AdapterLayer:
    if strength == 1:
        return layer
    return replace(layer, terms=tuple(replace(t, weight=t.weight * strength) for t in layer.terms))
