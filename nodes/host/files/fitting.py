"""A LoRA file's layers as those of the connected model: what the host's Load LoRA would do with each.

The host's own map is asked with the name that the file has; this pack's reading of the name comes after it.
A layer that the host turns around (the halves of an adaLN) is turned here, in its factors. Kinds that change
the weight they find (DoRA, OFT, BOFT, GLoRA) are computed by the host on the base model's own weight and kept
as the difference, which follows the strength as the host's does.

Shapes: ΔW (out, in, *kernel), rows [start:stop] of a fused weight; down (r, in, *kernel).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter, AdapterLayer
from ....spectral_core.attach.targets import layer_shape
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.files.lora_import import ImportedLoRA
from ....spectral_core.files.lora_layers import layer_of_difference
from ....spectral_core.files.lora_names import layer_name
from ....spectral_core.maths.layers import LayerShape
from ....spectral_core.names.layer_name import LayerName
from ....spectral_core.names.spellings import KOHYA_PART, NATIVE_PART, in_lora_file
from ....spectral_core.names.unet_blocks import UNetLayout
from ..model import compat
from ..model import places as keys


@dataclass(frozen=True)
class _Side:
    """MODEL or CLIP: its patcher, the host's map of names, and this pack's names of its weights.

    renames_all: it is the MODEL, whose weights all get this pack's names."""

    patcher: Any
    known: Mapping[str, Any]
    ours: Mapping[str, str]
    renames_all: bool


@dataclass(frozen=True)
class _Weight:
    """One weight of the host's, or rows of it, with what the host does to an update of it."""

    side: _Side
    key: str
    offset: tuple[int, int, int] | None
    function: Any

    @property
    def path(self) -> str:
        return self.key.removesuffix(".weight")

    @property
    def name(self) -> str:
        """This pack's name of the layer."""
        if self.offset is None and not self.side.renames_all:
            return layer_name(f"text_encoders.{self.path}")
        if self.offset is None:
            return self.side.ours.get(self.key, self.path)
        return f"{self.path}[{self.offset[1]}:{self.offset[1] + self.offset[2]}]"


def fitted(read: ImportedLoRA, model: Any, clip: Any) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter under the names of the connected MODEL and CLIP, and notes.

    Raises SpectralAdapterError where two layers of the file are the same weight.
    """
    sides = []
    if model is not None:
        known = compat.model_keys(model)
        sides.append(_Side(model, known, keys.unet_names(known), True))
    if clip is not None:
        sides.append(_Side(clip.patcher, compat.clip_keys(clip), {}, False))
    layers: dict[str, AdapterLayer] = {}
    renamed = 0
    for old, layer in read.adapter.layers.items():
        name, weight = old, _find(sides, _names(read.sources.get(old, ""), old))
        vector = LayerName.parse(old).vector
        if weight is not None and vector is not None:
            foreign = old.startswith((f"{KOHYA_PART}.", f"{NATIVE_PART}."))
            if weight.offset is None and (weight.side.renames_all or foreign):
                name = f"{weight.name}.{vector[1]}"
        elif weight is not None:
            layer, is_turned = _as_the_host(layer, weight)
            foreign = old.startswith((f"{KOHYA_PART}.", f"{NATIVE_PART}."))
            if is_turned and (weight.side.renames_all or foreign):
                name = weight.name
        renamed += name != old
        _put(layers, name, layer, read.sources.get(old, old))
    notes = [f"{renamed} layers were named after the connected model's weights"] if renamed else []
    notes += _add_dependent(layers, read.dependent, sides)
    return replace(read.adapter, layers=layers), tuple(notes)


def file_names(adapter: Adapter, model: Any) -> dict[str, str]:
    """Layers -> what the model's own map calls them, for files that the host reads whole: kohya's name where
    it has one; where the name that they have anyhow is right, they are left out.
    """
    known = compat.model_keys(model)
    by_target: dict[Any, str] = {}
    for name, value in known.items():
        parts = (value, None) if isinstance(value, str) else value
        if len(parts) == 2:  # no function: the host turns nothing around
            by_target.setdefault(parts, name)
            if name.startswith("lora_unet_"):
                by_target[parts] = name
    found = {}
    for place in keys.place(adapter, model, None).model:
        layer = LayerName.parse(place.name)
        module = str(layer) if layer.vector is None else f"{layer.part}.{layer.vector[0]}"
        target = (f"{place.module_path}.weight", place.offset)
        is_right = layer.rows is None and known.get(in_lora_file(module, False)) == target[0]
        if place.function is None and target in by_target and not (layer.part == "unet" and is_right):
            found[module] = by_target[target]
    return found


def layout_of(model: Any) -> UNetLayout | None:
    """The blocks of a Stable Diffusion's UNet; None for another kind of model."""
    try:
        return UNetLayout.from_native(path for path, _ in model.model.diffusion_model.named_modules())
    except SpectralAdapterError:
        return None


def _put(layers: dict[str, AdapterLayer], name: str, layer: AdapterLayer, source: str) -> None:
    if name in layers:
        raise SpectralAdapterError(
            f"layer {source}: the file has two updates of the weight {name}; expected one"
        )
    layers[name] = layer


def _names(source: str, name: str) -> Iterator[str]:
    """What the host's map may call a layer: as the file has it, then as this pack reads it."""
    if source:
        yield source
        if source.startswith("lora_unet__"):  # of some Wan trainers
            yield source.replace("lora_unet__", "lora_unet_", 1)
    if name:
        yield from keys.candidates(name)


def _find(sides: list[_Side], names: Iterator[str]) -> _Weight | None:
    for name in names:
        for side in sides:
            if name in side.known:
                value = side.known[name]
                parts = (value,) if isinstance(value, str) else value
                key, offset, function = (*parts, None, None)[:3]
                return _Weight(side, key, offset, function)
    return None


def _as_the_host(layer: AdapterLayer, weight: _Weight) -> tuple[AdapterLayer, bool]:
    """The layer with this weight's kernel and turned as the host turns it; False where only the host can."""
    host = layer_shape(keys.module_at(weight.side.patcher.model, weight.path))
    layer = _with_kernel(layer, host, weight.offset)
    if weight.function is None:
        return layer, True
    turned = []
    for term in layer.terms:
        up = term.params["up"]
        if not _moves_rows(weight.function, len(up)):
            return layer, False
        turned.append(replace(term, params={**term.params, "up": weight.function(up).contiguous()}))
    return AdapterLayer(layer.shape, tuple(turned)), True


def _moves_rows(function: Any, count: int) -> bool:
    """Whether it only puts a weight's rows in another order, so that it may be done to ``up`` alone."""
    with torch.inference_mode(False), torch.no_grad():
        numbered = torch.arange(count, dtype=torch.float32)[:, None]
        found = function(numbered.expand(count, 3).clone())
    same_rows = tuple(found.shape) == (count, 3) and bool((found == found[:, :1]).all())
    return same_rows and torch.equal(found[:, :1].sort(0).values, numbered)


def _with_kernel(layer: AdapterLayer, host: LayerShape | None, offset: Any) -> AdapterLayer:
    """Kernels of one, and flattened ones, as the model's own layer has them."""
    shape = layer.shape
    if host is None or (offset is not None and offset[0] != 0) or host == shape:
        return layer
    inner = (host.in_features, *host.kernel)
    is_same = host.in_features * math.prod(host.kernel) == shape.in_features * math.prod(shape.kernel)
    is_plain = not shape.kernel or math.prod(shape.kernel) == 1
    if not is_same or not is_plain:
        return layer
    terms = tuple(
        replace(term, params={**term.params, "down": term.params["down"].reshape(-1, *inner)})
        for term in layer.terms
    )
    return AdapterLayer(LayerShape(shape.out_features, host.in_features, host.kernel), terms)


def _add_dependent(
    layers: dict[str, AdapterLayer], dependent: Mapping[str, Mapping[str, Tensor]], sides: list[_Side]
) -> list[str]:
    """Layers of kinds that need the base weight; which had none, in the notes."""
    missing = []
    for module, tensors in dependent.items():
        weight = _find(sides, _names(module, ""))
        difference = None if weight is None else _difference(weight, module, tensors)
        if weight is None or difference is None:
            missing.append(module)
        else:
            _put(layers, weight.name, layer_of_difference(module, difference), module)
    found = len(dependent) - len(missing)
    notes = []
    if found:
        notes.append(
            f"{found} layers change the weight they find (DoRA, OFT and the like): computed with the "
            "connected model's weights, right for this base model only"
        )
    if any(key.endswith(".oft_blocks") for tensors in dependent.values() for key in tensors):
        notes.append(
            "strength scales the difference that OFT makes at strength 1; Load LoRA turns by less, so "
            "the two are the same at strength 1 only"
        )
    if missing:
        notes.append(f"{len(missing)} layers have no place in this model, such as {', '.join(missing[:3])}")
    return notes


def _difference(weight: _Weight, module: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """ΔW by the host's own formula at strength 1; None where the host does not know the kind either."""
    import comfy.lora

    with torch.inference_mode(False), torch.no_grad():
        own = compat.original_weight(weight.side.patcher, weight.key, torch.device("cpu"))
        own = own if weight.offset is None else own.narrow(*weight.offset).clone()
        patch = comfy.lora.load_lora(dict(tensors), {module: weight.key}, log_missing=False)
        if weight.key not in patch:
            return None
        patches = [(1.0, patch[weight.key], 1.0, None, weight.function)]
        changed: Tensor = comfy.lora.calculate_weight(patches, own.clone(), weight.key)
        return changed - own
