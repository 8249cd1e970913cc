"""Second moments of a layer's inputs under one concept, and what updates do there, from small matrices alone.

Every fixed update is linear in the input x, and every gated one linear in its gated rows g = G(z)·z. So with
the joint vector w = [x; g] each update is U·L·w, and all norms and inner products follow from E[w wᵀ], with
no activation kept. In place of x there may be coordinates P·x, P an orthonormal basis of all the adapters'
rows: the moments then have the size of the ranks instead of the layer's width, and lose nothing about them.

    E‖ΔW x‖² = tr(UᵀU · L E[w wᵀ] Lᵀ)

Shapes: x (…, fan_in), for a convolution one unfolded patch per row; d = fan_in, or the rows of P (d, fan_in);
second_moment (d, d), cross (g, d), energy (g, g), mean_open (g,), g the gated rows of all adapters together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter.adapter import Term
from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape


def wide(tensor: Tensor) -> Tensor:
    """In float64, on its own device; on the CPU where that has none."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


@dataclass(frozen=True)
class GatedRows:
    """E[g xᵀ], E[g gᵀ] and the mean opening of all adaptive gates in a layer, of every adapter.

    ``keys``: (adapter, term, rows) in the order of the rows; adapters and terms count from 0, in the order in
    which they were given to the collector.
    """

    keys: tuple[tuple[int, int, int], ...]
    cross: Tensor
    energy: Tensor
    mean_open: Tensor

    def rows(self, adapter: int, term: int) -> slice | None:
        """Where a term's rows are."""
        start = 0
        for a, t, count in self.keys:
            if (a, t) == (adapter, term):
                return slice(start, start + count)
            start += count
        return None


@dataclass(frozen=True)
class Statistics:
    """C = Σ x xᵀ / N over N = ``count`` rows; with ``basis`` P it is P C Pᵀ. ``gated``: see above."""

    second_moment: Tensor
    count: int
    basis: Tensor | None = None
    gated: GatedRows | None = None

    @classmethod
    def of(cls, x: Tensor) -> Statistics:
        """Of activations (…, fan_in), in float64."""
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        return cls(rows.mT @ rows / max(len(rows), 1), len(rows))

    @property
    def width(self) -> int:
        """fan_in of the layer."""
        return (self.second_moment if self.basis is None else self.basis).shape[-1]

    def coordinates(self, down: Tensor) -> Tensor:
        """Rows (R, fan_in) as seen by the second moment, (R, d), in float64."""
        if down.shape[1] != self.width:
            raise SpectralAdapterError(
                f"inputs of width {self.width} for a layer of fan-in {down.shape[1]}: expected the same, for "
                "a convolution its unfolded patches"
            )
        rows = wide(down)
        return rows if self.basis is None else rows @ wide(self.basis).to(rows).mT

    def within(self, basis: Tensor) -> Statistics:
        """The same statistics in the coordinates of ``basis`` (d, fan_in), orthonormal rows in float64.

        Exact where they are complete, or where ``basis`` spans no more than their own.
        """
        turn = self.coordinates(basis)
        gated = self.gated
        if gated is not None:
            gated = GatedRows(gated.keys, gated.cross.to(turn) @ turn.mT, gated.energy, gated.mean_open)
        return Statistics(turn @ self.second_moment.to(turn) @ turn.mT, self.count, basis, gated)


@torch.inference_mode(False)  # a host's inference tensors would be of no use to others
@torch.no_grad()
def pooled(earlier: Mapping[str, Statistics], later: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Layer name -> statistics of both inputs together, every row counting alike.

    Both are of the same adapters in the same order. Layers that shared a moment in both share it still; one
    that only one of the two has keeps it. Raises SpectralAdapterError for different coordinates or gates.
    """
    moments: dict[tuple[int, int], Tensor] = {}
    found = dict(earlier) | dict(later)
    for name in (name for name in earlier if name in later):
        one, two = earlier[name], later[name]
        _check_alike(name, one, two)
        share = two.count / max(one.count + two.count, 1)
        key = id(one.second_moment), id(two.second_moment)
        if key not in moments:
            moments[key] = torch.lerp(one.second_moment, two.second_moment.to(one.second_moment), share)
        gated = one.gated
        if gated is not None and two.gated is not None:
            gated = GatedRows(
                gated.keys,
                torch.lerp(gated.cross, two.gated.cross.to(gated.cross), share),
                torch.lerp(gated.energy, two.gated.energy.to(gated.energy), share),
                torch.lerp(gated.mean_open, two.gated.mean_open.to(gated.mean_open), share),
            )
        found[name] = Statistics(moments[key], one.count + two.count, one.basis, gated)
    return found


def _check_alike(name: str, one: Statistics, two: Statistics) -> None:
    keys = [None if s.gated is None else s.gated.keys for s in (one, two)]
    alike = keys[0] == keys[1] and (one.basis is None) == (two.basis is None)
    if alike and one.basis is not None and two.basis is not None:
        alike = one.basis.shape == two.basis.shape and torch.allclose(one.basis, two.basis, atol=1e-5)
    if not alike or one.second_moment.shape != two.second_moment.shape:
        raise SpectralAdapterError(
            f"layer {name}: statistics in different coordinates or of different gates: collect both with the "
            "same adapters in the same order"
        )


Inputs = Mapping[str, "Tensor | Statistics"]
"""Layer name -> activations (…, fan_in) or their statistics."""


@dataclass(frozen=True)
class Response:
    """An update as U·(plain·x + gated·g): up (m, R), plain (R, d), gated (R, g) or nothing."""

    up: Tensor
    plain: Tensor
    gated: Tensor | None = None

    def scaled(self, factor: float) -> Response:
        return Response(self.up * factor, self.plain, self.gated)

    def cross(self, statistics: Statistics) -> Tensor:
        """E[v xᵀ] (R, d) of v = plain·x + gated·g."""
        found = self.plain @ statistics.second_moment.to(self.plain)
        if self.gated is not None and statistics.gated is not None:
            found = found + self.gated @ statistics.gated.cross.to(found)
        return found

    def energy(self, statistics: Statistics) -> Tensor:
        """E[v vᵀ] (R, R)."""
        found = self.cross(statistics) @ self.plain.mT
        if self.gated is None or statistics.gated is None:
            return found
        rows = statistics.gated
        mixed = self.plain @ rows.cross.to(found).mT + self.gated @ rows.energy.to(found)
        return found + mixed @ self.gated.mT

    def norm(self, statistics: Statistics) -> float:
        """Root mean square over the inputs of the update's output."""
        seen = self.energy(statistics)
        return float(((self.up.mT @ self.up) * seen).sum().clamp(min=0).sqrt())


def joined(responses: Sequence[Response]) -> Response:
    """The sum of several updates."""
    width = next((r.gated.shape[1] for r in responses if r.gated is not None), 0)
    gated = None
    if width:
        gated = torch.cat(
            [r.plain.new_zeros(len(r.plain), width) if r.gated is None else r.gated for r in responses]
        )
    return Response(torch.cat([r.up for r in responses], 1), torch.cat([r.plain for r in responses]), gated)


@dataclass(frozen=True)
class Placed:
    """A term with its strength (its own weight aside) and its place: the adapter's and the term's number."""

    term: Term
    strength: float
    adapter: int
    index: int


def response_of(placed: Placed, shape: LayerShape, statistics: Statistics, name: str) -> Response:
    """What a term does to inputs with these statistics.

    Raises SpectralAdapterError, with the layer's name, for an adaptive gate that was not recorded.
    """
    factors = placed.term.factors(shape, placed.strength)
    up, down = wide(factors.scaled_up()), wide(factors.down.flatten(1))
    if placed.term.mergeable:
        return Response(up, statistics.coordinates(down))
    rows = None if statistics.gated is None else statistics.gated.rows(placed.adapter, placed.index)
    if rows is None or statistics.gated is None:
        raise SpectralAdapterError(
            f"layer {name}: an adaptive gate has no fixed ΔW: collect statistics with this adapter among the "
            "adapters, or freeze it first (its gates' mean openings are kept in it)"
        )
    if rows.stop - rows.start != len(down):
        raise SpectralAdapterError(
            f"layer {name}: statistics of a gate with {rows.stop - rows.start} rows for one with "
            f"{len(down)}: they were collected for other adapters, or for these in another order"
        )
    width = statistics.second_moment.shape[0]
    select = down.new_zeros(len(down), len(statistics.gated.mean_open))
    select[:, rows] = torch.eye(len(down), dtype=down.dtype, device=down.device)
    return Response(up, down.new_zeros(len(down), width), select)


def mean_rows(placed: Placed, shape: LayerShape, statistics: Statistics) -> Tensor:
    """down (R, d) of a term in these coordinates, rows of an adaptive gate times their mean opening."""
    down = statistics.coordinates(placed.term.factors(shape).down.flatten(1))
    if placed.term.mergeable or statistics.gated is None:
        return down
    rows = statistics.gated.rows(placed.adapter, placed.index)
    return down if rows is None else down * statistics.gated.mean_open.to(down)[rows, None]


def same_tensors(a: Term, b: Term) -> bool:
    """Whether two terms hold the same tensors, not equal ones: then one was kept from the other."""
    if a.params is b.params:  # also of those that read their tensors anew each time
        return True
    if any(getattr(term.params, "is_immutable", False) for term in (a, b)):
        return False
    return a.params.keys() == b.params.keys() and all(a.params[k] is b.params[k] for k in a.params)


def row_basis(downs: Sequence[Tensor]) -> Tensor:
    """Orthonormal rows P (d, fan_in), float64, that span these rows (R, fan_in); d ≤ fan_in."""
    stacked = torch.cat([wide(down.flatten(1)) for down in downs])
    q, _ = torch.linalg.qr(stacked.mT)
    made: Tensor = q.mT.contiguous()
    return made
