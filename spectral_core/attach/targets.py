"""Which layers of a module tree an adapter is for: presets, globs, and a report of the rest.

A layer is told by its attributes, not by its class, because hosts bring their own linear layers:
``in_features`` and ``weight``, or ``kernel_size`` and ``weight``. What a preset takes is told by
:mod:`.roles`: what feeds an attention and what follows it, on every family of models.

Shapes: weights are (out, in) or (out, in, *kernel), as :mod:`..maths.layers` has them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.adapter import AdapterLayer
from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape
from ..names.layer_name import LayerName, check_glob, matches
from ..names.spellings import canonical_path, path_spellings
from ..words import OneLine
from .roles import ATTENTION, FEED_FORWARD, roles

ROOT = "root"
"""The path of a tree that is itself a layer: its name is ``<part>.root``."""

MOST_ITEMS = 64  # of ``targets``

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

PRESETS = {
    "attention": ATTENTION,
    "attention+mlp": ATTENTION | {FEED_FORWARD},
    "all-linear": None,
    "all": None,
}
"""Preset -> the :func:`.roles.roles` of the layers that it takes; None: whatever they are for."""


@dataclass(frozen=True, repr=False)
class TargetReport(OneLine):
    """matched: names of the layers found; refused: chosen but unusable, name -> why; unselected: the other
    layers; linear: how many of those found are linear layers, and how many there are."""

    matched: tuple[str, ...]
    refused: dict[str, str]
    unselected: tuple[str, ...]
    linear: tuple[int, int] = (0, 0)

    @property
    def share(self) -> str:
        """What share of the linear layers was found, as a phrase."""
        found, count = self.linear
        return f"{found} of {count} linear layers ({found / max(count, 1):.0%})"

    @property
    def unmatched(self) -> dict[str, str]:
        """Every layer that is not a target -> why."""
        return self.refused | dict.fromkeys(self.unselected, "not among the targets")

    def __str__(self) -> str:
        lines = [
            f"{len(self.matched)} layers matched, {self.share}, {len(self.unselected)} others left alone"
        ]
        lines += [f"  not usable: {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


def modules_by_path(root: nn.Module) -> dict[str, nn.Module]:
    """Path -> module over the whole tree, a shared module under each of its names, the root as ``root``.

    The wrapper that ``torch.compile`` puts around a module is left out of the paths.
    """
    found: dict[str, nn.Module] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if hasattr(module, "_orig_mod"):
            continue
        plain = ".".join(p for p in path.split(".") if p != "_orig_mod")
        found[plain or ROOT] = module
    return found


def layer_shape(module: nn.Module) -> LayerShape | None:
    """Shape of a linear or convolution layer's weight, from its attributes: a quantised weight's own shape
    says nothing."""
    if getattr(module, "weight", None) is None:
        return None
    if hasattr(module, "kernel_size") and hasattr(module, "in_channels"):
        size: Any = module.kernel_size
        kernel = (size,) if isinstance(size, int) else tuple(size)
        sides = int(module.out_channels), int(module.in_channels)  # type: ignore[arg-type]
        one, other = sides[::-1] if getattr(module, "transposed", False) else sides
        return LayerShape(one, other // int(getattr(module, "groups", 1)), kernel)
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return LayerShape(int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    return None


def layer_problem(module: nn.Module) -> str | None:
    """Why an adapter cannot be made for a module, or None."""
    if getattr(module, "transposed", False):
        return "a transposed convolution; only plain ones can be adapted"
    if getattr(module, "groups", 1) != 1 and hasattr(module, "kernel_size"):
        return f"a convolution with groups={module.groups}; only groups=1 can be adapted"
    return update_problem(module)


def update_problem(module: nn.Module, layer: AdapterLayer | None = None) -> str | None:
    """Why a module's forward cannot take an update of its weight, or None; this layer's where it is given."""
    shape = layer_shape(module)
    if shape is None:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() < 2:
            return f"its weight has {weight.dim()} dimension(s); linear and convolution layers can be adapted"
        return f"{type(module).__name__} is neither a linear nor a convolution layer"
    groups, is_transposed = int(getattr(module, "groups", 1)), bool(getattr(module, "transposed", False))
    if is_transposed and groups != 1:
        return f"a transposed convolution with groups={groups}; merge the adapter"
    if (is_transposed or groups != 1) and layer is not None and not layer.mergeable:
        return "its gate adapts to the input, and the layer is a grouped or transposed convolution"
    if len(shape.kernel) > 3:
        return f"a convolution over {len(shape.kernel)} axes; 1 to 3 can be adapted"
    return None


def weight_problem(module: nn.Module) -> str | None:
    """Why a module's weight cannot be read as numbers, or None; its forward may still take an adapter."""
    weight, shape = module.weight, layer_shape(module)
    assert isinstance(weight, Tensor) and shape is not None
    if weight.dtype not in WEIGHT_DTYPES or tuple(weight.shape) != shape.weight_shape:
        return f"a quantised weight ({weight.dtype}, {tuple(weight.shape)} for a layer {shape})"
    return None


def bypassed_layers(root: nn.Module) -> dict[int, str]:
    """id of each layer whose weight is read without its forward being called -> what does that."""
    bypassed = {}
    for module in root.modules():
        if isinstance(module, nn.MultiheadAttention):
            bypassed[id(module.out_proj)] = (
                "nn.MultiheadAttention reads this weight directly and never calls the layer: merge the "
                "adapter, or use a model whose attention has q, k, v and out layers"
            )
        if isinstance(module, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            why = (
                "nn.TransformerEncoderLayer's fast path reads this weight directly at inference: call "
                "torch.backends.mha.set_fastpath_enabled(False) first, or merge the adapter"
            )
            bypassed |= {id(module.linear1): why, id(module.linear2): why}
    return bypassed


Chooser = Callable[[str], bool]
_Layer = tuple[nn.Module, LayerShape, "str | None"]


def _chooser(item: str, part: str, layers: Mapping[str, _Layer], root: nn.Module) -> Chooser:
    """One item of ``targets`` as a test on paths."""
    if item not in PRESETS:
        check_glob(item, "targets")
        return lambda path: any(
            matches(spelling, item) or matches(f"{part}.{spelling}", item)
            for spelling in path_spellings(path)
        )
    linears = {path: shape.weight_shape for path, (_, shape, _) in layers.items() if not shape.kernel}
    wanted = PRESETS[item]
    if wanted is None:
        return lambda path: item == "all" or path in linears
    of = roles(linears, modules_by_path(root))  # type: ignore[arg-type]
    return lambda path: of.get(path) in wanted


def split_targets(targets: str | Iterable[str]) -> list[str]:
    """The items of ``targets``: a list as it is, text at its commas.

    Raises SpectralAdapterError for more items than are matched in a moment.
    """
    if isinstance(targets, str):
        targets = targets.split(",", MOST_ITEMS)
    items = [item.strip() for item in targets if item.strip()]
    if len(items) > MOST_ITEMS:
        raise SpectralAdapterError(f"more than {MOST_ITEMS} targets: use globs that take in more layers each")
    return items


def find_targets(
    root: nn.Module, part: str, targets: str | Iterable[str] = "attention", *, packed: bool = False
) -> tuple[dict[str, Tensor], TargetReport]:
    """Layer name -> pretrained weight of every layer that ``targets`` names, and a report.

    targets: presets (``attention``, ``attention+mlp``, ``all-linear``, ``all``; :mod:`.roles` says what an
    attention is), glob patterns on module paths (``down_blocks.*.to_q``); a list, or text with commas. A
    module under several names counts once, under its first. A layer inside another layer is left to the
    outer one. packed: weights too whose numbers cannot be read here (quantised ones), for who unpacks them.

    Raises SpectralAdapterError where an item matches no usable layer, with names that come near.

    >>> import torch, spectral_core as sc
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> weights, report = sc.find_targets(model, "unet", "all")
    >>> list(weights)
    ['unet.0', 'unet.2']
    """
    items = split_targets(targets)
    if not items:
        raise SpectralAdapterError(f"no targets given: expected one of {', '.join(PRESETS)} or a glob")
    weights: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    layers, others = _layers_of(root, packed)
    for item in items:
        chooses, hits = _chooser(item, part, layers, root), 0
        reasons: dict[str, str] = {}
        for path, (module, _, problem) in layers.items():
            if not chooses(path):
                continue
            name = _name(part, path)
            if problem is None:
                hits += 1
                weights[name] = module.weight.detach()  # type: ignore[operator]
            else:
                reasons[name] = problem
        if item not in PRESETS:
            reasons |= {_name(part, p): why for p, why in others.items() if chooses(p)}
        if not hits:
            raise SpectralAdapterError(_no_match(item, list(layers), reasons))
        refused |= reasons
    names = [_name(part, path) for path in layers]
    order = {name: i for i, name in enumerate(names)}
    weights = dict(sorted(weights.items(), key=lambda kv: order[kv[0]]))
    unselected = tuple(n for n in names if n not in weights and n not in refused)
    linear = [n for n, (_, shape, _) in zip(names, layers.values(), strict=True) if not shape.kernel]
    share = (sum(n in weights for n in linear), len(linear))
    return weights, TargetReport(tuple(weights), refused, unselected, share)


def _name(part: str, path: str) -> str:
    """The layer's name; a text encoder's has its ``text_model.`` level whatever this transformers release
    calls it."""
    return str(LayerName(part, canonical_path(path) if part.startswith("text_encoder") else path))


def _layers_of(root: nn.Module, packed: bool = False) -> tuple[dict[str, _Layer], dict[str, str]]:
    """path -> (module, shape, why it is unusable or None); path -> why, of other modules with a weight."""
    bypassed = bypassed_layers(root)
    layers: dict[str, _Layer] = {}
    others: dict[str, str] = {}
    seen: set[int] = set()
    for path, module in modules_by_path(root).items():
        parents = (path[:dot] for dot, char in enumerate(path) if char == ".")
        if id(module) in seen or ROOT in layers or any(parent in layers for parent in parents):
            continue
        seen.add(id(module))
        shape = layer_shape(module)
        problem = layer_problem(module)
        if shape is None:
            if isinstance(getattr(module, "weight", None), Tensor):
                others[path] = str(problem)
            continue
        problem = problem or bypassed.get(id(module)) or (None if packed else weight_problem(module))
        layers[path] = (module, shape, problem)
    return layers, others


def _no_match(item: str, paths: list[str], reasons: dict[str, str]) -> str:
    """The message for an item without a usable layer."""
    message = f"targets {item!r}: no layer matches"
    if reasons:
        name, why = next(iter(reasons.items()))
        message = f"targets {item!r}: none of {len(reasons)} matching layers can be adapted; {name}: {why}"
    near = difflib.get_close_matches(item, paths, n=3, cutoff=0.3) or paths[:3]
    known = f"layers here are such as {', '.join(near)}" if near else "this tree has no layer to adapt"
    return f"{message}. Expected one of the presets {', '.join(PRESETS)} or a glob; {known}"
