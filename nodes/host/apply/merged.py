"""Merged: an adapter as the host's own low-rank weight patches, exact and at no cost per step.

The host adds them to its weights when it loads the model, and takes them out again; which of its many ways it
does that (whole, on the fly with little memory, quantised) is its own business.

Shapes: up (out, R), down (R, in, *kernel) per layer; rows of a fused weight by the place's offset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from torch import Tensor

from ....spectral_core.errors import SpectralAdapterError
from ..model import compat
from ..model.places import Place
from . import folded_cache as factors

KEY = "spectral_adapters_merged"
_MEASURED = 4  # layers whose rounding is measured for a report


def add(patcher: Any, places: Iterable[Place], strength_of: Callable[[str], float]) -> int:
    """Add the layers to a patcher (of a clone: it is changed) as weight patches; how many there are.

    strength_of: a layer's strength by its name; 0 adds nothing. Raises SpectralAdapterError for adaptive
    gates.
    """
    patches: dict[float, list[tuple[Any, Any]]] = {}
    count = 0
    for place in places:
        strength = strength_of(place.name)
        if not place.layer.mergeable:
            raise SpectralAdapterError(
                f"layer {place.name}: its gate adapts to the picture, which no fixed weight can do: choose "
                "mode auto or live, or freeze the gates (Fuse Adapters with freeze_gates)"
            )
        if strength == 0:
            continue
        count += 1
        everything = range(len(place.layer.terms))
        if all(term.config.is_linear for term in place.layer.terms):
            up, down = factors.folded(place.name, place.layer, everything)
        else:
            up, down = factors.folded(place.name, place.layer, everything, strength)
            strength = 1.0
        if down.shape[0] > 0:  # a frozen gate may have closed every row
            patches.setdefault(strength, []).append((place.target, compat.weight_patch(up, down)))
    for strength, pairs in patches.items():
        for group in _without_repeats(pairs):
            patcher.add_patches(group, strength)
    if compat.keeps_passes(patcher.model):
        for when in (compat.ON_PRE_RUN, compat.ON_CLEANUP):
            patcher.remove_callbacks_with_key(when, KEY)
            patcher.add_callback_with_key(when, KEY, _forget)
    return count


def _forget(patcher: Any) -> None:
    compat.forget(patcher.model)


def rounding(patcher: Any, places: Iterable[Place], strength_of: Callable[[str], float]) -> str:
    """What is lost where the host rounds the sum to a quantised weight, measured in a few layers; "" where
    it does not."""
    rounded = [p for p in places if strength_of(p.name) != 0 and compat.is_rounded(patcher, p.key)]
    shown = [p for p in rounded[:: max(1, len(rounded) // _MEASURED)] if p.function is None][:_MEASURED]
    errors = [_rounding_error(patcher, place, strength_of(place.name)) for place in shown]
    if not errors:
        return ""
    return (
        f"; WARNING: {len(rounded)} weights are quantised and merging rounds them again: the error is "
        f"{median(errors):.2g} times the update itself ({min(errors):.2g} to {max(errors):.2g} in "
        f"{len(errors)} layers measured). Mode live has none"
    )


def _rounding_error(patcher: Any, place: Place, strength: float) -> float:
    everything = range(len(place.layer.terms))
    is_linear = all(term.config.is_linear for term in place.layer.terms)
    up, down = factors.folded(place.name, place.layer, everything, 1.0 if is_linear else strength)
    change = (up @ down.flatten(1)) * (strength if is_linear else 1.0)

    def add(weight: Tensor) -> Tensor:
        part = weight if place.offset is None else weight.narrow(*place.offset)
        part += change.view(part.shape)
        return weight

    return compat.rounding_error(patcher, place.key, add)


def _without_repeats(pairs: list[tuple[Any, Any]]) -> list[dict[Any, Any]]:
    """The pairs as dictionaries: several, where two layers change one weight."""
    groups: list[dict[Any, Any]] = []
    for target, patch in pairs:
        free = next((group for group in groups if target not in group), None)
        if free is None:
            free = {}
            groups.append(free)
        free[target] = patch
    return groups
