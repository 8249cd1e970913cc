"""Apply an adapter to a MODEL and a CLIP: on clones, by weight patches or in the forward path, with a report.

The objects that come in are never changed. Strength 0 leaves the model as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.attach.placement import tied
from ....spectral_core.attach.targets import modules_by_path
from ....spectral_core.errors import SpectralAdapterError
from ..model import compat
from ..model import places as keys
from ..model import words as tokens
from ..model.places import CLIP, MODEL, Place, Places, module_at
from . import clip as clip_live
from . import gate_records as records
from . import merged
from . import rebase as originals
from . import stack as live

MODES = ("auto", "merged", "live")
BASE_MISMATCHES = ("delta", "rebase", "strict")
_ATTACHMENT = "spectral_adapters"  # which adapters a patcher already carries
_SHOWN = 12  # names listed in a report


@dataclass(frozen=True)
class Applied:
    """The changed clones (or None where nothing was connected), what was done, and how (merged or live)."""

    model: Any | None
    clip: Any | None
    report: str
    mode: str


@dataclass
class _Side:
    """One of the two inputs while it is being worked on."""

    name: str
    owner: Any  # the host's MODEL (a patcher) or CLIP
    places: tuple[Place, ...]
    strength: float

    @property
    def patcher(self) -> Any:
        return self.owner if self.name == MODEL else self.owner.patcher


def apply(
    adapter: Adapter,
    model: Any | None,
    clip: Any | None,
    strength_model: float,
    strength_clip: float,
    mode: str = "auto",
    base_mismatch: str = "delta",
) -> Applied:
    """The adapter on clones of MODEL and CLIP (either may be None), times the adapter's own strength.

    mode: merged (weight patches), live (forward path), auto (merged wherever that is exact). base_mismatch,
    for a base that is not the one the adapter was trained on: delta applies the stored change as it is,
    rebase finds the singular columns in this model, strict refuses. Raises SpectralAdapterError where no
    layer of a connected input matches, where a shape differs, and where the mode is impossible.
    """
    _check(adapter, strength_model, strength_clip, mode, base_mismatch)
    key = records.key_of(adapter)  # of the adapter as it came, whatever base it is fitted to
    adapter, notes = originals.for_base(adapter, model, clip, base_mismatch)
    places = keys.place(adapter, model, clip)
    lines = [f"{adapter.provenance.name or 'Adapter'}: {', '.join(adapter.methods) or 'no layers'}", *notes]
    sides = [
        _Side(MODEL, model, places.model, strength_model),
        _Side(CLIP, clip, places.clip, strength_clip),
    ]
    done: dict[str, Any] = {MODEL: model, CLIP: clip}
    modes: list[str] = []
    for side in sides:
        if side.owner is None:
            continue
        done[side.name], used, text = _apply_side(adapter, key, side, mode)
        modes += [used] if used else []
        lines += text
    if clip is not None and strength_clip != 0:
        done[CLIP], text = tokens.add(done[CLIP], adapter)
        lines += text
    lines += _rest(places)
    return Applied(done[MODEL], done[CLIP], "\n".join(lines), modes[0] if modes else "off")


def _check(adapter: Any, strength_model: float, strength_clip: float, mode: str, base_mismatch: str) -> None:
    if not getattr(adapter, "is_spectral_adapter", False):
        raise SpectralAdapterError(
            f"expected an ADAPTER, found {type(adapter).__name__}: connect a node that loads one"
        )
    for name, value in (("strength_model", strength_model), ("strength_clip", strength_clip)):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise SpectralAdapterError(f"{name} {value!r}: expected a finite number")
    if mode not in MODES:
        raise SpectralAdapterError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
    if base_mismatch not in BASE_MISMATCHES:
        raise SpectralAdapterError(
            f"base mismatch {base_mismatch!r}: expected one of {', '.join(BASE_MISMATCHES)}"
        )


def _apply_side(adapter: Adapter, key: str, side: _Side, mode: str) -> tuple[Any, str, list[str]]:
    """(the clone, the mode used or "", lines for the report)."""
    if not side.places:
        return side.owner, "", [f"{side.name}: the adapter has no layers for it; unchanged"]
    strength_of = _strengths(adapter, side.strength)
    if all(strength_of(place.name) == 0 for place in side.places):
        return side.owner, "", [f"{side.name}: strength 0, off"]
    used, why = _choose(adapter, side, mode)
    owner = side.owner.clone()
    patcher = owner if side.name == MODEL else owner.patcher
    if used == "merged":
        count = merged.add(patcher, side.places, strength_of)
    else:
        count = _add_live(adapter, key, side, owner, strength_of)
    if used == "merged":
        why += merged.rounding(side.patcher, side.places, strength_of)
    lines = [f"{side.name}: {used} in {count} layers at strength {side.strength:g} ({why})"]
    return owner, used, lines + _tied(patcher, side.places) + _mark(patcher, key, side.name)


def _tied(patcher: Any, places: tuple[Place, ...]) -> list[str]:
    """What merged and live do differently, because one weight has several layers."""
    found = {place.name: module_at(patcher.model, place.module_path) for place in places}
    layers = {name: module for name, module in found.items() if module is not None}
    shared = tied(layers, modules_by_path(patcher.model))
    return [f"WARNING: {name}: {why}" for name, why in shared.items()]


def _add_live(
    adapter: Adapter, key: str, side: _Side, owner: Any, strength_of: Callable[[str], float]
) -> int:
    places = tuple(place for place in side.places if strength_of(place.name) != 0)
    strengths = tuple(strength_of(place.name) for place in places)
    if side.name == MODEL:
        live.add(owner, live.Entry(key, places, strengths, adapter.schedule), MODEL)
    else:
        clip_live.add(owner, live.Entry(key, places, strengths))
    return len(places)


def _strengths(adapter: Adapter, strength: float) -> Callable[[str], float]:
    return lambda name: adapter.strength_of(name) * strength


def _choose(adapter: Adapter, side: _Side, mode: str) -> tuple[str, str]:
    """(merged or live, why). The text encoder runs before the denoising and follows no schedule."""
    adaptive = sum(not place.layer.mergeable for place in side.places)
    scheduled = adapter.schedule is not None and side.name == MODEL
    if mode == "merged" and scheduled:
        raise SpectralAdapterError(
            "mode merged: fixed weights cannot follow the strength schedule of this adapter: choose auto or "
            "live, or leave the schedule out (Adapter Strength: 0 to 1, constant)"
        )
    if mode == "live":
        return "live", "as chosen"
    problems = [why for place in side.places if (why := compat.patch_problem(side.patcher, place.key))]
    if mode == "merged":
        if problems:
            raise SpectralAdapterError(
                f"mode merged: {problems[0]}, and so are {len(problems) - 1} more: nothing can be added to "
                "it. Choose auto or live"
            )
        return "merged", "as chosen"
    if adaptive:
        told = adapter.provenance.frozen_gates
        return "live", f"{adaptive} layers have adaptive gates" + (f"; {told}" if told else "")
    if scheduled:
        return "live", "its strength follows a schedule"
    if problems:
        return "live", f"{len(problems)} weights are quantised: {problems[0]}"
    rounded = sum(compat.is_rounded(side.patcher, place.key) for place in side.places)
    if rounded:
        return (
            "live",
            f"{rounded} weights are quantised: merged, the update would be rounded to their few bits",
        )
    return "merged", "exact as weight patches, no cost per step"


def _mark(patcher: Any, key: str, side: str) -> list[str]:
    """Remember on the clone what it carries; a warning where it carries this adapter already."""
    carried = patcher.attachments.get(_ATTACHMENT, ())
    patcher.set_attachments(_ATTACHMENT, (*carried, key))
    if key not in carried:
        return []
    return [
        f"WARNING: this {side} already carries this adapter: now it acts {carried.count(key) + 1} times. Its "
        "loader and Apply Adapter each apply it: use one of them"
    ]


def _rest(places: Places) -> list[str]:
    """What was not applied, and why."""
    lines = [
        f"{len(names)} layers are for a {side}, which is not connected: left out"
        for side, names in places.absent.items()
    ]
    if places.unmatched:
        lines.append(f"{len(places.unmatched)} layers have no place in this model and were left out:")
        shown = list(places.unmatched.items())[:_SHOWN]
        lines += [f"  {name}: {why}" for name, why in shown]
        if len(places.unmatched) > _SHOWN:
            lines.append(f"  and {len(places.unmatched) - _SHOWN} more")
    return lines
