"""Adaptive gates in few operations, and together for layers that see the same input, such as q, k and v.

A gate is arithmetic on a handful of numbers, and a model has hundreds of gates, so the number of operations
is what costs (:mod:`spectral_core.attach.gate_inference`). Layers are grouped by their names; whether a call
really brings the same input is looked up (it is the same tensor), and a layer that has another one evaluates
its own gate.

Shapes: x (B, T, in), z (B, T, n·R) for n layers of R rows, φ and logits (n, B, R).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....spectral_core.attach.gate_inference import KIND, FoldedGates
from ....spectral_core.attach.update import LayerUpdate
from ....spectral_core.maths.precision import autocast_dtype
from ..model.places import Place
from . import folded_cache as factors


class SharedUpdate(LayerUpdate):
    """An update that may take its gated rows z from a group."""

    group: Group | None = None
    index: int = 0

    def _add(self, x: Tensor, y: Tensor, strength: float | Tensor, in_place: bool) -> Tensor:
        if self.group is not None and not isinstance(strength, Tensor) and x.device == y.device:
            z = self.group.rows(self.index, x)
            if z is not None:
                up = self.pieces[0].ready(x.device, x.dtype, 1.0)[1]
                return self._add_product(y, z, None, up, strength, in_place)
        return super()._add(x, y, strength, in_place)


class Group:
    """Layers with one adaptive gate each, of one rank and kind, in the order of the model."""

    def __init__(self, members: list[SharedUpdate]) -> None:
        self.members = members
        for index, member in enumerate(members):
            member.group, member.index = self, index
        config: Any = members[0].pieces[0].terms[0].config
        self.rank = config.rank
        self.runtime = members[0].control.gates
        self._stacked: dict[tuple[torch.device, torch.dtype], tuple[Tensor, FoldedGates]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the input: the model's call is over, or every member has had it."""
        self._x: Tensor | None = None
        self._z: Tensor | None = None
        self._left = 0

    def release(self) -> None:
        self._stacked.clear()

    def rows(self, index: int, x: Tensor) -> Tensor | None:
        """The member's z (B, T, R), closed rows 0; None where it must compute its own."""
        runtime = self.runtime
        usual = x.dim() == 3 and runtime.mode == "hard" and not torch.is_grad_enabled()
        if not usual or autocast_dtype(x.device.type) is not None or torch.compiler.is_compiling():
            return None
        if self._x is None:
            self._z = self._compute(x)
            self._x, self._left = x, len(self.members)
        elif self._x is not x:
            return None
        assert self._z is not None
        z = self._z[..., index * self.rank : (index + 1) * self.rank]
        self._left -= 1
        if self._left == 0:
            self.reset()
        return z

    def _compute(self, x: Tensor) -> Tensor:
        down, gates = self._ready(x.device, x.dtype)
        z = F.linear(x, down)
        is_open = gates.open(z)
        if self.runtime.recorder is not None:
            for member, rows in zip(self.members, is_open.unbind(0), strict=True):
                self.runtime.recorder.record(member.pieces[0].gate_name, rows, self.runtime.progress)
        return z.mul_(is_open.transpose(0, 1).flatten(1)[:, None])

    def _ready(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, FoldedGates]:
        """The members' factors and gates in one piece each; the members' own become parts of it."""
        key = (device, dtype)
        if key not in self._stacked:
            pieces = [member.pieces[0] for member in self.members]
            ready = [piece.ready(device, dtype, 1.0) for piece in pieces]
            masters = factors.stacked_down([member.layer for member in self.members], (0,))
            with torch.inference_mode(False), torch.no_grad():
                down = masters.to(device, dtype)
                parts = down.split(self.rank)
                for piece, (_, up, gate), part in zip(pieces, ready, parts, strict=True):
                    piece._cache.clear()
                    piece._cache[(device, dtype, 1.0, ())] = part, up, gate
                gates = FoldedGates.of([gate for _, _, gate in ready])
            self._stacked[key] = down, gates
        return self._stacked[key]


def groups_of(pairs: Iterable[tuple[Place, SharedUpdate]]) -> list[Group]:
    """Groups of the updates of one adapter that can share their gates; a group may have one member.

    Convolutions, gates of pairs of rows (dft) and of the other kind go the core's way.
    """
    found: dict[object, list[SharedUpdate]] = {}
    for place, update in pairs:
        if len(update.layer.terms) != 1 or not update.pieces[0].gated or update.is_convolution:
            continue
        config: Any = update.pieces[0].terms[0].config
        if config.rows_per_gate == 1 and config.gate_kind == KIND:
            key = (_source(place) or place.name, place.layer.shape.in_features, config.rank)
            found.setdefault(key, []).append(update)
    return [Group(members) for members in found.values()]


def _source(place: Place) -> str | None:
    """A word for what a layer reads: the same for layers that are likely to see one tensor; None where it is
    alone.
    """
    if place.offset is not None:  # rows of a fused weight
        return place.module_path
    parent, _, leaf = place.module_path.rpartition(".")
    if parent.endswith(".attn2"):  # the text, the same for every block
        return "text" if leaf in ("to_k", "to_v") else None
    return parent if leaf in ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj", "q", "k", "v") else None
