"""The forward path of an adapted layer: y + strength·up·(gate·(down·x)), two small products and never ΔW.

One :class:`LayerUpdate` per attached layer; a module's updates are called by its dispatcher
(:mod:`.dispatcher`).

Shapes: x (…, in) and y (…, out), or x (B, in, *space) and y (B, out, *space) for a convolution; z has R rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.adapter import AdapterLayer, Term
from ..adapter.schedule import Schedule
from ..errors import SpectralAdapterError
from ..gates import formula as gates
from ..gates.formula import GateRuntime
from ..maths.layers import Geometry, channel_view, expand, project
from ..maths.precision import autocast_dtype
from ..names.layer_name import LayerName
from .factors import Piece, pieces_of, term_name
from .targets import WEIGHT_DTYPES


@dataclass(eq=False)
class Control:
    """What may change between two calls, for all layers of one adapter in one attachment.

    ``multiplier`` is the schedule's value now: a number, one per batch row (B,), or None while the
    progress is unknown.
    """

    gates: GateRuntime
    schedule: Schedule | None
    strength: float = 1.0
    multiplier: float | Tensor | None = None

    def set_progress(self, progress: float | Tensor) -> None:
        """Progress 0 … 1, a number or one per batch row; equal rows count as one number."""
        if self.schedule is None:
            return
        if isinstance(progress, Tensor):
            values = [self.schedule.at(p) for p in progress.detach().flatten().tolist()]
            same = len(set(values)) == 1
            self.multiplier = values[0] if same else torch.tensor(values, device=progress.device)
        else:
            self.multiplier = self.schedule.at(progress)

    def factor(self, name: LayerName) -> float | Tensor:
        """strength · schedule(progress); off is off, whatever the progress."""
        if self.schedule is None or self.strength == 0:
            return self.strength
        if self.multiplier is None:
            raise SpectralAdapterError(
                f"layer {name}: its adapter has a strength schedule and the progress is not known; call "
                "set_progress(0 … 1) before the model runs, or attach adapter.with_schedule(None)"
            )
        return self.strength * self.multiplier


class LayerUpdate:
    """One adapter's update of one module, as the module's dispatcher adds it to the module's output."""

    def __init__(
        self,
        name: LayerName,
        layer: AdapterLayer,
        strength: float,
        control: Control,
        module: nn.Module,
        trained: bool,
    ) -> None:
        self.name, self.layer, self.strength, self.control = name, layer, strength, control
        self.module = module
        self.pieces = pieces_of(str(name), layer, trained)
        self.geometry = Geometry.of(module)
        self.is_convolution = bool(layer.shape.kernel)
        self.gives_view = not self.is_convolution and getattr(module, "bias", None) is not None
        self.follows_schedule = not name.part.startswith(
            "text_encoder"
        )  # those run once, before the denoising
        self.trained = trained
        self._digest: str | None = None

    def snapshot(self, gate_buffers: Mapping[str, Mapping[str, Tensor]]) -> AdapterLayer:
        """The layer with detached copies of its tensors as they are now, and what its gates have learned."""
        terms = []
        for i, term in enumerate(self.layer.terms):
            learned = gate_buffers.get(term_name(str(self.name), i), {})
            values = {k: v.detach().clone() for k, v in {**term.params, **learned}.items()}
            terms.append(Term(term.config, values, term.weight))
        return AdapterLayer(self.layer.shape, tuple(terms))

    def fixed_copy(self, memo: dict[int, Any]) -> LayerUpdate:
        """The same update for a copy of the module, with a control of its own, and not in training."""
        if id(self.control) not in memo:
            gates_ = GateRuntime(self.control.gates.mode, self.control.gates.temperature, settle_steps=0)
            memo[id(self.control)] = replace(self.control, gates=gates_)
        twin = copy.copy(self)
        twin.control, twin.trained = memo[id(self.control)], False
        twin.layer = self.snapshot(self.control.gates.buffers()) if self.trained else self.layer
        twin.pieces = pieces_of(str(self.name), twin.layer, trained=False)
        return twin

    def prepare(self, weight: Tensor) -> None:
        """Fold for the module as it is now, so that the first call (or compilation) finds it done."""
        if not self.trained and weight.dtype in WEIGHT_DTYPES and not weight.is_meta:
            for piece in self.pieces:
                if piece.linear:
                    piece.ready(weight.device, weight.dtype, 1.0)

    @property
    def order(self) -> tuple[str, float, str]:
        """The place among several updates of one module: by content, so that it does not depend on who came
        first."""
        if self._digest is None:
            self._digest = self.layer.content_hash
        points = "" if self.control.schedule is None else repr(self.control.schedule.points)
        return self._digest, self.strength * self.control.strength, points

    def _strength_now(self) -> float | Tensor:
        factor = self.control.factor(self.name) if self.follows_schedule else self.control.strength
        return self.strength * factor

    def add(self, x: Tensor, y: Tensor, in_place: bool) -> Tensor:
        """y + strength · ΔW·x, in y's dtype; written into y where ``in_place`` allows it."""
        strength = self._strength_now()
        if not isinstance(strength, Tensor) and strength == 0:
            return y
        if x.dim() == 1 + len(self.layer.shape.kernel):  # one sample without a batch axis
            return self._add(x[None], y[None], strength, False)[0]
        return self._add(x, y, strength, in_place)

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        """In which the module computes with x."""
        given = None if x.dtype == torch.float64 else autocast_dtype(x.device.type)
        return x.dtype if given is None else given

    def _add(self, x: Tensor, y: Tensor, strength: float | Tensor, in_place: bool) -> Tensor:
        if x.device != y.device:  # a host that moves the input inside the layer
            x = x.to(y.device)
        dtype = self._dtype_for(x)
        for piece in self.pieces:
            scale, rows, folded = self._split(strength, piece)
            down, up, gate = piece.ready(x.device, dtype, folded)
            if down.shape[0] == 0:  # a frozen gate may have closed every row
                continue
            z = project(x, down, self.geometry)
            factor = self._row_factors(z, piece, gate, rows)
            y = self._add_product(y, z, factor, up, scale, in_place)
        return y

    def _row_factors(
        self, z: Tensor, piece: Piece, tensors: Mapping[str, Tensor], rows: Tensor | None
    ) -> Tensor | None:
        """What multiplies z, (B, R) or (B, 1): the gate's values and the schedule's; None for nothing."""
        found = None
        gate = piece.terms[0].config.adaptive_gate
        if gate is not None:
            name, runtime = piece.gate_name, self.control.gates
            found = gates.values(
                z,
                tensors,
                gate.kind,
                gate.rows_per_gate,
                self.is_convolution,
                runtime,
                name,
                gate.budget,
            )
        if rows is None:
            return found
        per_row = self._per_row(rows, z)[:, None]
        return per_row if found is None else found * per_row

    def _split(self, strength: float | Tensor, piece: Piece) -> tuple[float, Tensor | None, float]:
        """strength as (a number for the product, multipliers per row, a number for the fold)."""
        if isinstance(strength, Tensor):
            if not piece.linear:
                raise SpectralAdapterError(
                    f"layer {self.name}: strength_law 'rotation' needs one progress for the whole batch; "
                    "found rows with different schedule values. Use strength_law 'delta' with a schedule"
                )
            return 1.0, strength, 1.0
        return (strength, None, 1.0) if piece.linear else (1.0, None, strength)

    def _per_row(self, rows: Tensor, z: Tensor) -> Tensor:
        """Multipliers (B,) for the rows of z: repeated whole where a batch was doubled for guidance."""
        count, batch = len(rows), z.shape[0]
        if batch % count or (z.dim() == 2 and batch != count):
            raise SpectralAdapterError(
                f"layer {self.name}: the progress has {count} rows and the layer's input {batch}; expected "
                "one per batch row (or a whole repetition of them), or give one progress for all"
            )
        return rows.to(z.device, z.dtype).repeat(batch // count)

    def _add_product(
        self, y: Tensor, z: Tensor, factor: Tensor | None, up: Tensor, scale: float, in_place: bool
    ) -> Tensor:
        """y + scale · up·(factor·z) into the rows that the name gives, in place where that saves memory.

        factor: (B, R) or (B, 1). It multiplies ``up``, each batch row its own, where that is the smaller one.
        """
        fused = z.dim() == 3 and z.dtype == y.dtype and not self.is_convolution
        right = up.mT.expand(z.shape[0], -1, -1) if z.dim() == 3 else up.mT
        per_row = factor is not None and fused and _on_up(z, up)
        if factor is not None and per_row:
            right = right * factor[:, :, None]
        elif factor is not None:
            factor = channel_view(factor, z, self.is_convolution)
            z = z * factor if torch.is_grad_enabled() else z.mul_(factor)
        # With a bias, F.linear returns a view: writing to it would cost a copy of the gradient in backward.
        if not in_place or (torch.is_grad_enabled() and self.gives_view):
            if self.name.rows is None and fused:
                return torch.baddbmm(y, z, right, alpha=scale)
            y = y.clone()
        rows, axis = self.name.rows, 1 if self.is_convolution else -1
        part = y if rows is None else y.narrow(axis, rows[0], rows[1] - rows[0])
        if self.is_convolution or z.dim() > 3 or z.dtype != y.dtype:
            part.add_(expand(z, up, self.is_convolution, self.geometry.groups).to(y.dtype), alpha=scale)
        elif z.dim() == 3 and (per_row or torch.is_grad_enabled() or not part.is_contiguous()):
            part.baddbmm_(z, right, alpha=scale)
        elif z.dim() == 3:  # the product accumulates into y: no tensor of tokens × out besides y
            part.flatten(0, 1).addmm_(z.flatten(0, 1), up.mT, alpha=scale)
        else:
            part.addmm_(z, right, alpha=scale)
        return y


def _on_up(z: Tensor, up: Tensor) -> bool:
    """Whether factors of z's rows go on ``up``: a batch row's copy of it is smaller than its z."""
    return z.dim() == 3 and z.shape[1] > up.shape[0]
