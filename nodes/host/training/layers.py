"""Which layers of the host's model train, under this pack's names, and their original weights.

Layers of Stable Diffusion's UNets get diffusers' names through the host's own map, so that the file loads in
diffusers too; layers of other families keep the host's names (``diffusion_model.…``).

Shapes: W (out, in, *kernel), float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ....spectral_core.adapter.adapter import Adapter, AdapterLayer
from ....spectral_core.attach.attaching import Attachment, attach
from ....spectral_core.attach.targets import (
    bypassed_layers,
    find_targets,
    layer_problem,
    layer_shape,
    split_targets,
)
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.maths.layers import LayerShape
from ....spectral_core.names.layer_name import LayerName
from ....spectral_core.names.spellings import NATIVE_PART
from ..model import base_weights, compat
from ..model import places as keys

UNET = "unet"


class BaseWeights(Mapping[str, Tensor]):
    """Layer name -> the base model's own weight, read when it is asked for: one at a time in memory."""

    def __init__(self, patcher: Any, shapes: Mapping[str, LayerShape], clip: Any = None) -> None:
        self.shapes = dict(shapes)
        self._patcher, self._clip = patcher, clip
        self._weight = base_weights.source(self.shapes, patcher, clip)

    def only(self, names: Iterable[str]) -> BaseWeights:
        """The same weights, fewer of them."""
        return BaseWeights(self._patcher, {name: self.shapes[name] for name in names}, self._clip)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._weight(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def without_numbers(self) -> dict[str, Tensor]:
        """The shapes alone, as tensors."""
        return {n: torch.empty(shape.weight_shape, device="meta") for n, shape in self.shapes.items()}


def trees(patcher: Any) -> dict[str, nn.Module]:
    """part -> a tree with this part's paths: the model itself, and its layers under diffusers' names.

    The second one holds the very same modules, hung up elsewhere; norms too, whose vectors an adapter may
    change.
    """
    unet, _ = _unet_and_rest(patcher, with_norms=True)
    return {UNET: unet, NATIVE_PART: patcher.model.diffusion_model}


def _unet_and_rest(patcher: Any, with_norms: bool = False) -> tuple[nn.Module, nn.Module]:
    """The layers that have diffusers' names, hung up under them, and the others under their own; where none
    has one, the others are the whole model."""
    root = patcher.model.diffusion_model
    unet, rest = nn.Module(), nn.Module()
    bypassed, hung = bypassed_layers(root), set()
    for key, name in _unet_names(patcher).items():
        module = keys.module_at(patcher.model, key.removesuffix(".weight"))
        if not isinstance(module, nn.Module) or id(module) in bypassed:
            continue
        if with_norms or layer_problem(module) is None:
            _hang(unet, name.removeprefix(f"{UNET}."), module)
            hung.add(id(module))
    if not hung:
        return unet, root
    for path, module in root.named_modules():
        if id(module) not in hung and layer_problem(module) is None and id(module) not in bypassed:
            _hang(rest, path, module)
    return unet, rest


def _unet_names(patcher: Any) -> dict[str, str]:
    """Weight key -> ``unet.<path>``, of the model's own layers.

    In the order of the model's weights, as everywhere else; an adapter's first random numbers follow it.
    """
    found = keys.unet_names(compat.model_keys(patcher))
    own = (key for key in patcher.model.state_dict() if key.startswith(f"{NATIVE_PART}."))
    return {key: found[key] for key in own if key in found}


def attached(
    undo: ExitStack,
    adapter: Adapter,
    found: Mapping[str, nn.Module],
    device: torch.device | None = None,
    *,
    strict: bool = False,
) -> list[Attachment]:
    """The adapter on each of the :func:`trees` that it changes, until ``undo`` ends; in training where a
    ``device`` for its parameters is given."""
    trainable = device is not None
    return [
        undo.enter_context(attach(found[part], adapter, part, trainable, strict, device))
        for part in adapter.parts
        if part in found
    ]


def _hang(tree: nn.Module, path: str, module: nn.Module) -> None:
    *outer, last = path.split(".")
    for step in outer:
        # not add_module: a step may be called like something that every module has
        tree = tree._modules.setdefault(step, nn.Module())  # type: ignore[assignment]
    tree._modules[last] = module


def chosen(patcher: Any, targets: str) -> tuple[dict[str, LayerShape], str]:
    """Name and shape of every layer that ``targets`` names, and what share of the linear layers it is, as
    a phrase; SpectralAdapterError where there is none."""
    parts = dict(zip((UNET, NATIVE_PART), _unet_and_rest(patcher), strict=True))
    parts = {part: tree for part, tree in parts.items() if tree._modules}
    items = split_targets(targets) or [targets]
    refused = {part: dict(_refused(tree, part, items)) for part, tree in parts.items()}
    for item in items:
        if all(item in of for of in refused.values()):
            raise next(iter(refused.values()))[item]
    found: dict[str, LayerShape] = {}
    linear = 0
    for part, tree in parts.items():
        if here := [item for item in items if item not in refused[part]]:
            found |= {n: LayerShape.of(w) for n, w in find_targets(tree, part, here, packed=True)[0].items()}
        linear += sum(1 for m in tree.modules() if (s := layer_shape(m)) and not s.kernel)
    count = sum(not shape.kernel for shape in found.values())
    return found, f"{count} of the model's {linear} linear layers ({count / max(linear, 1):.0%})"


def _refused(tree: nn.Module, part: str, items: Iterable[str]) -> Iterator[tuple[str, SpectralAdapterError]]:
    """The items of ``targets`` that name nothing in a tree, with why."""
    for item in items:
        try:
            find_targets(tree, part, item, packed=True)
        except SpectralAdapterError as error:
            yield item, error


def fitted(adapter: Adapter, patcher: Any) -> tuple[Adapter, dict[str, LayerShape], list[str]]:
    """The adapter with the names that its layers train under here; those layers; what the user should know.

    Raises SpectralAdapterError where none of its layers is in this model.
    """
    places = keys.place(adapter, patcher, None)
    named = _unet_names(patcher)
    renamed: dict[str, AdapterLayer] = {}
    trained: dict[str, LayerShape] = {}
    for place in places.model:
        if place.function is not None:
            raise SpectralAdapterError(
                f"layer {place.name}: the host rearranges {place.key}, so this layer cannot train here; "
                "leave it out of the adapter"
            )
        name = named.get(f"{place.module_path}.weight", place.module_path)
        if vector := LayerName.parse(place.name).vector:
            name = f"{name}.{vector[1]}"
        if place.offset is not None:
            _, start, length = place.offset
            native = LayerName.parse(place.module_path)
            name = str(replace(native, rows=(start, start + length)))
        renamed[place.name] = place.layer
        trained[name] = place.layer.shape
    if not trained:
        raise SpectralAdapterError(
            f"adapter {adapter.provenance.name or '(unnamed)'}: has no layers for the model, so there is "
            "nothing to go on with; connect another adapter, or none"
        )
    new_names = dict(zip(renamed, trained, strict=True))
    layers = {new_names.get(name, name): layer for name, layer in adapter.layers.items()}
    notes = []
    if places.unmatched:
        notes.append(f"{len(places.unmatched)} layers have no place in this model and stay as they are")
    if absent := sum(len(names) for names in places.absent.values()):
        notes.append(f"{absent} layers are for the text encoder and stay as they are")
    return replace(adapter, layers=layers), trained, notes
