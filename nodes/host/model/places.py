"""Which of the host's weights each layer of an adapter is, always asked from the host's own maps.

A map's value is a weight key, or (key, (dimension, start, length)) for the rows of a fused weight (q, k and v
in one), and sometimes a function that the host puts between a patch and the weight.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ....spectral_core.adapter.adapter import Adapter, AdapterLayer
from ....spectral_core.adapter.strengths import is_text_encoder
from ....spectral_core.attach.targets import layer_shape
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.maths.layers import LayerShape
from ....spectral_core.names.layer_name import LayerName
from ....spectral_core.names.spellings import BARE_PART, KOHYA_PART, canonical_path, to_kohya, unflatten
from . import compat

MODEL, CLIP = "MODEL", "CLIP"
_CLIP_PREFIXES = {"text_encoder": ("clip_l", "clip_h", "clip_g"), "text_encoder_2": ("clip_g",)}


@dataclass(frozen=True)
class Place:
    """One layer of an adapter and the host's weight it changes.

    offset: (dimension, start, length) of a slice of the weight. function: what the host does to a patch of
    this weight; such a layer cannot be applied in the forward path.
    """

    name: str
    layer: AdapterLayer
    key: str
    offset: tuple[int, int, int] | None = None
    function: Callable[[Any], Any] | None = None

    @property
    def target(self) -> Any:
        """As the host's ``add_patches`` wants it."""
        if self.function is not None:
            return (self.key, self.offset, self.function)
        return self.key if self.offset is None else (self.key, self.offset)

    @property
    def module_path(self) -> str:
        return self.key.removesuffix(".weight").removesuffix(".bias")


@dataclass(frozen=True)
class Places:
    """Where an adapter goes: layers of the MODEL and of the CLIP, and the rest.

    unmatched: layer -> why. absent: layers for an input that is not connected, per side.
    """

    model: tuple[Place, ...] = ()
    clip: tuple[Place, ...] = ()
    unmatched: dict[str, str] = field(default_factory=dict)
    absent: dict[str, tuple[str, ...]] = field(default_factory=dict)


def place(adapter: Adapter, model: Any | None, clip: Any | None) -> Places:
    """The host's weights for every layer of an adapter; model and clip may be None.

    Raises SpectralAdapterError where a shape differs, and where none of an input's layers matches.
    """
    maps = {}
    if model is not None:
        maps[MODEL] = _Map(model, compat.model_keys(model))
    if clip is not None:
        maps[CLIP] = _Map(clip.patcher, compat.clip_keys(clip))
    found: dict[str, list[Place]] = {MODEL: [], CLIP: []}
    unmatched: dict[str, dict[str, str]] = {MODEL: {}, CLIP: {}}
    absent: dict[str, list[str]] = {}
    for name, layer in adapter.layers.items():
        side, place_ = _find(name, layer, maps)
        if place_ is not None:
            found[side].append(place_)
        elif side in maps:
            unmatched[side][name] = maps[side].why_not(name)
        else:
            absent.setdefault(side, []).append(name)
    for side in maps:
        if unmatched[side] and not found[side]:
            raise SpectralAdapterError(_no_match(adapter, side, unmatched[side], maps[side].patcher))
    return Places(
        tuple(found[MODEL]),
        tuple(found[CLIP]),
        unmatched[MODEL] | unmatched[CLIP],
        {side: tuple(names) for side, names in absent.items()},
    )


def unet_names(known: Mapping[str, Any]) -> dict[str, str]:
    """Weight key -> this pack's name ``unet.<path>``, where the host's map has diffusers' name for it.

    A name that reads like one by accident (``time_embedding.linear_1`` of another family) is none: the host
    lists a UNet's as diffusers' own LoRA files spell them as well.
    """
    found = {}
    for name, key in known.items():
        path = unflatten(name.removeprefix("lora_unet_")) if name.startswith("lora_unet_") else None
        if path is None or not isinstance(key, str):
            continue
        spelled = path.replace(".to_", ".processor.to_").removesuffix(".0")
        if f"unet.{spelled}" in known or f"unet.{path}" in known:
            found[key] = f"unet.{path}"
    return found


@dataclass(frozen=True)
class _Map:
    patcher: Any
    keys: dict[str, Any]

    def find(self, name: str, layer: AdapterLayer) -> Place | None:
        vector = LayerName.parse(name).vector
        for candidate in candidates(name):
            if candidate in self.keys:
                found = _place(name, layer, self.keys[candidate])
                if vector is not None and not self._has(found):
                    continue
                self._check_shape(found)
                return found
        return None

    def _has(self, place_: Place) -> bool:
        """Whether there is such a vector: the map names weights alone."""
        found = getattr(
            module_at(self.patcher.model, place_.module_path), place_.key.rpartition(".")[2], None
        )
        return getattr(found, "ndim", 0) == 1

    def _check_shape(self, place_: Place) -> None:
        module = module_at(self.patcher.model, place_.module_path)
        found = None if module is None else layer_shape(module)
        if LayerName.parse(place_.name).vector is not None:
            found = LayerShape(getattr(module, place_.key.rpartition(".")[2]).numel(), 1)
        if found is None:
            found = LayerShape.of(self.patcher.model.state_dict()[place_.key])
        whole = found
        if place_.offset is not None and place_.offset[0] == 0:
            _, start, length = place_.offset
            if start + length > found.out_features:
                raise SpectralAdapterError(
                    f"layer {place_.name}: found rows {start}:{start + length}, expected some of the "
                    f"{found.out_features} rows of {place_.key}: the adapter is for a larger model"
                )
            whole = replace(found, out_features=length)
        if whole != place_.layer.shape:
            raise SpectralAdapterError(
                f"layer {place_.name}: found an update for a weight of shape {place_.layer.shape}, expected "
                f"{whole} ({place_.key} of this {type(self.patcher.model).__name__}). The adapter was made "
                "for another base model: load that model, or an adapter for this one"
            )

    def why_not(self, name: str) -> str:
        near = difflib.get_close_matches(name.replace(".", "_"), [k for k in self.keys if k], n=1, cutoff=0.8)
        model = type(self.patcher.model).__name__
        return f"{model} has no such layer" + (f" (nearest name: {near[0]})" if near else "")


def module_at(root: Any, path: str) -> Any | None:
    """The module at a path, through ``torch.compile``'s wrapper too; None where there is none."""
    for step in path.split("."):
        root = getattr(root, step, None)
        root = getattr(root, "_orig_mod", root)
    return root


def _place(name: str, layer: AdapterLayer, value: Any) -> Place:
    """The map's value with the rows of the layer's own name inside it."""
    key, offset, function = (value, None, None) if isinstance(value, str) else (*value, None, None)[:3]
    offset = None if offset is None else tuple(offset)
    rows, vector = LayerName.parse(name).rows, LayerName.parse(name).vector
    if vector is not None:
        key = f"{key.removesuffix('.weight')}.{vector[1]}"
    if rows is not None:
        start = 0 if offset is None else offset[1]
        offset = (0, start + rows[0], rows[1] - rows[0])
    return Place(name, layer, key, offset, function)


def _find(name: str, layer: AdapterLayer, maps: dict[str, _Map]) -> tuple[str, Place | None]:
    """(the side a layer belongs to, its place there or None)."""
    likely = side_of(name)
    for side in (likely, CLIP if likely == MODEL else MODEL):
        found = maps[side].find(name, layer) if side in maps else None
        if found is not None:
            return side, found
    return likely, None


def side_of(name: str) -> str:
    """Whether a layer is the MODEL's or the CLIP's, told from its name alone."""
    return CLIP if is_text_encoder(name) else MODEL


def candidates(name: str) -> Iterator[str]:
    """The names under which the host's maps may have a layer, or a vector's module; most specific first."""
    layer = LayerName.parse(name)
    part, path = layer.part, layer.vector[0] if layer.vector else layer.path
    if part == KOHYA_PART:  # kept as a LoRA file has it
        yield path
        return
    if part == "unet":
        yield to_kohya(f"unet.{path}", False)
    elif part in _CLIP_PREFIXES:
        path = canonical_path(path)
        for two in (True, False):
            yield to_kohya(f"{part}.{path}", two)
        for prefix in _CLIP_PREFIXES[part]:
            yield f"text_encoders.{prefix}.transformer.{path}"
    yield f"{part}.{path}"
    if part == BARE_PART:
        yield path
    yield f"text_encoders.{part}.{path}"


def _no_match(adapter: Adapter, side: str, unmatched: dict[str, str], patcher: Any) -> str:
    name, why = next(iter(unmatched.items()))
    family = adapter.provenance.family
    return (
        f"adapter {adapter.provenance.name or '(unnamed)'}: none of its {len(unmatched)} layers for the "
        f"{side} was found, such as {name}: {why}. The adapter is for "
        f"{'a model of the family ' + repr(family) if family else 'another kind of model'}, this {side} is "
        f"a {type(patcher.model).__name__}: connect the model it was made for"
    )
