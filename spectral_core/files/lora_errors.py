"""What an export loses, measured on the factors: rounding, and an adaptive gate's decisions.

Shapes: down (R, in, *kernel), up (out, R); Gram matrices (R, R) in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapter.adapter import AdapterLayer, Term
from ..maths.layers import LayerShape
from ..maths.lowrank import Factors
from ..methods import method_of


def gate_loss(layer: AdapterLayer) -> float:
    """Root of the terms' summed E‖ΔW(g) − ΔW(mask)‖² over their summed E‖ΔW(g)‖²; fixed terms lose none."""
    lost = total = 0.0
    for term in layer.terms:
        if term.mergeable:
            total += _norm(term.factors(layer.shape)) ** 2
        else:
            squares = _gate_squares(term, layer.shape)
            lost, total = lost + squares[0], total + squares[1]
    return (lost / total) ** 0.5 if total else 0.0


def _gate_squares(term: Term, shape: LayerShape) -> tuple[float, float]:
    """E‖ΔW(g) − ΔW(mask)‖² and E‖ΔW(g)‖² for independent gates g with P(g = 1) = p, the mean openings.

    With G the Gram matrix of the rows' rank-one updates: Σᵢⱼ E[dᵢdⱼ] Gᵢⱼ, d = g − mask; likewise with g.
    """
    assert term.config.adaptive_gate is not None
    p = term.params["gate.mean_open"].double().cpu()
    mask = method_of(term.config).freeze(term.config, term.params)[1]["gate.mask"].double().cpu()
    factors = term.factors(shape)
    gram = _gram(factors).cpu()
    rank, pairs = term.config.rank, term.config.adaptive_gate.rows_per_gate
    gram = gram.reshape(pairs, rank, pairs, rank).sum((0, 2))  # row i and, for dft, its imaginary twin
    spread = (p * (1 - p) * gram.diagonal()).sum()
    lost = (p - mask) @ gram @ (p - mask) + spread
    return max(float(lost), 0.0), max(float(p @ gram @ p + spread), 0.0)


def _gram(factors: Factors) -> Tensor:
    """(R, R) inner products of the rank-one updates scale · upᵢ downᵢ, in float64."""
    up, down = factors.scaled_up().double(), factors.down.flatten(1).double()
    return (up.mT @ up) * (down @ down.mT)


def _norm(factors: Factors) -> float:
    return float(_gram(factors).sum().clamp_min(0).sqrt())


def distance(found: Factors, exact: Factors) -> float:
    """‖found − exact‖ / ‖exact‖, by the difference's own factors, in which nothing cancels."""
    up, down = (t.double() for t in (found.scaled_up(), found.down))
    up0, down0 = (t.double() for t in (exact.scaled_up(), exact.down))
    change = Factors(torch.cat([down, down - down0]), torch.cat([up - up0, up0], 1))
    size = _norm(exact)
    return _norm(change) / size if size else 0.0
