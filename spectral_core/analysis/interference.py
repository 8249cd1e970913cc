"""What adapters do to each other, layer by layer: overlap before a fusion, crosstalk, and retention after it.

    overlap     mean cos² of the principal angles of two updates' row (input) and column (output) spaces,
                ‖V_iᵀV_j‖_F² / min(r_i, r_j); two random spaces of these ranks give max(r_i, r_j)/n on average
    crosstalk   ‖ΔW_j X_i‖ / ‖ΔW_i X_i‖: what concept j does to concept i's inputs, beside what i does
    retention   1 − ‖(ΔW − s_i ΔW_i) X_i‖ / ‖s_i ΔW_i X_i‖: 1 where the fused update does what concept i
    alone did

Inputs are a layer's activations or their second moment C = Σ x xᵀ / N; norms come from R×R matrices in
float64.

Shapes: X (…, fan_in), one row per token; of a convolution, one row per unfolded patch. C (fan_in, fan_in).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..adapter.adapter import Adapter, Term
from ..errors import SpectralAdapterError
from ..maths.lowrank import Factors, compact_svd, concatenate
from ..statistics.moments import Inputs, Placed, Response, Statistics, joined, response_of, same_tensors
from ..words import OneLine

__all__ = [
    "Crosstalk",
    "Inputs",
    "LayerOverlap",
    "Retention",
    "Statistics",
    "affinity",
    "crosstalk",
    "output_norm",
    "overlap",
    "retention",
]


@dataclass(frozen=True)
class LayerOverlap:
    """Two adapters in one layer; ``*_random`` is what unrelated spaces of these ranks show."""

    layer: str
    first: int
    second: int
    ranks: tuple[int, int]
    row: float
    row_random: float
    column: float
    column_random: float


@dataclass(frozen=True, repr=False)
class Crosstalk(OneLine):
    """[i][j] = ‖ΔW_j X_i‖/‖ΔW_i X_i‖ per layer, and ``total`` with the squares summed over layers first.

    None where concept i does nothing there.
    """

    layers: Mapping[str, tuple[tuple[float | None, ...], ...]]
    total: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, repr=False)
class Retention(OneLine):
    """[i] per layer, and ``total`` with the squares summed over layers first; None where concept i does
    nothing.
    """

    layers: Mapping[str, tuple[float | None, ...]]
    total: tuple[float | None, ...]


def output_norm(factors: Factors, inputs: Tensor | Statistics) -> float:
    """Root mean square over the rows x of ‖ΔW x‖: √tr(UᵀU · D C Dᵀ)."""
    up, down = factors.scaled_up().detach().double(), factors.down.detach().flatten(1).double()
    width = inputs.width if isinstance(inputs, Statistics) else inputs.shape[-1]
    if width != down.shape[1]:
        raise SpectralAdapterError(
            f"inputs of width {width} for a layer {factors.shape}: expected {down.shape[1]}, for a "
            "convolution its unfolded patches"
        )
    if len(down) == 0:  # a frozen gate may have closed every row
        return 0.0
    if isinstance(inputs, Statistics):
        return Response(up, inputs.coordinates(down)).norm(inputs)
    seen = Statistics.of(inputs.to(down).reshape(-1, width) @ down.mT).second_moment
    return float(((up.mT @ up) * seen).sum().clamp(min=0).sqrt())


def overlap(adapters: Sequence[Adapter]) -> list[LayerOverlap]:
    """Every pair of adapters in every layer that both change; layers with ΔW = 0 are left out.

    An adaptive gate counts with every row open.
    """
    found = []
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        spaces = {i: _spaces(a, name) for i, a in enumerate(adapters) if name in a.layers}
        for (i, (u_i, v_i)), (j, (u_j, v_j)) in combinations(spaces.items(), 2):
            if u_i.shape[0] != u_j.shape[0] or v_i.shape[0] != v_j.shape[0]:
                raise SpectralAdapterError(
                    f"layer {name} is {adapters[i].layers[name].shape} in adapter {i + 1} and "
                    f"{adapters[j].layers[name].shape} in adapter {j + 1}: they belong to different "
                    "base models"
                )
            ranks = (u_i.shape[1], u_j.shape[1])
            if not min(ranks):
                continue
            found.append(
                LayerOverlap(
                    name,
                    i,
                    j,
                    ranks,
                    row=float((v_i.mT @ v_j).square().sum()) / min(ranks),
                    row_random=max(ranks) / v_i.shape[0],
                    column=float((u_i.mT @ u_j).square().sum()) / min(ranks),
                    column_random=max(ranks) / u_i.shape[0],
                )
            )
    return found


def _spaces(adapter: Adapter, name: str) -> tuple[Tensor, Tensor]:
    """Orthonormal bases (out, r), (fan_in, r) of ΔW's column and row space, r its numerical rank."""
    layer, strength = adapter.layers[name], adapter.strength_of(name)
    u, s, v = compact_svd(concatenate([term.factors(layer.shape, strength) for term in layer.terms]))
    rounding = 1e-11 if s.dtype == torch.float64 else 1e-5
    rank = int((s > rounding * s[:1]).sum())
    return u[:, :rank].detach().double(), v[:, :rank].detach().double()


def affinity(adapters: Sequence[Adapter]) -> Crosstalk:
    """Crosstalk as far as weights alone can tell: ‖ΔW_j ΔW_iᵀ‖ / ‖ΔW_i ΔW_iᵀ‖.

    The inputs of concept i are taken to be what its own update responds to, C_i = ΔW_iᵀΔW_i/‖ΔW_i‖². An
    adaptive gate counts with every row open.
    """
    count = len(adapters)
    squares = torch.zeros(count, count, dtype=torch.float64)
    layers = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        updates = {i: _open_factors(a, name) for i, a in enumerate(adapters) if name in a.layers}
        grams = {i: up.mT @ up for i, (up, _) in updates.items()}
        here = torch.zeros(count, count, dtype=torch.float64)
        for i, (_, down_i) in updates.items():
            for j, (_, down_j) in updates.items():
                if down_i.shape[1] != down_j.shape[1]:
                    raise SpectralAdapterError(
                        f"layer {name}: these adapters belong to different base models"
                    )
                shared = down_j @ down_i.mT
                here[i, j] = ((grams[j] @ shared @ grams[i]) * shared).sum().clamp(min=0)
            own = (grams[i] * (down_i @ down_i.mT)).sum()  # ‖ΔW_i‖²: every layer's inputs count alike
            here[i] /= own if own > 0 else 1.0
        squares += here
        layers[name] = _ratios(here)
    return Crosstalk(layers, _ratios(squares))


def _open_factors(adapter: Adapter, name: str) -> tuple[Tensor, Tensor]:
    """up (out, R), down (R, fan_in) in float64, adaptive gates open."""
    layer, strength = adapter.layers[name], adapter.strength_of(name)
    factors = concatenate([term.factors(layer.shape, strength) for term in layer.terms])
    return factors.scaled_up().detach().double(), factors.down.detach().flatten(1).double()


def crosstalk(adapters: Sequence[Adapter], inputs: Sequence[Inputs]) -> Crosstalk:
    """What each adapter does to each other's inputs; ``inputs[i]`` are the activations under concept i."""
    _check_inputs(adapters, inputs)
    count = len(adapters)
    squares = torch.zeros(count, count, dtype=torch.float64)
    layers = {}
    for name in dict.fromkeys(name for given in inputs for name in given):
        here = torch.zeros(count, count, dtype=torch.float64)
        for i, given in enumerate(inputs):
            if name not in given:
                continue
            seen = given[name]  # once: it may come from a file
            for j, adapter in enumerate(adapters):
                if name in adapter.layers:
                    here[i, j] = _norm(_terms(adapters, j, name), name, adapters, seen) ** 2
        squares += here
        layers[name] = _ratios(here)
    return Crosstalk(layers, _ratios(squares))


def _terms(adapters: Sequence[Adapter], place: int, name: str, weight: float = 1.0) -> list[Placed]:
    """An adapter's terms in a layer at its own strengths times ``weight``."""
    adapter = adapters[place]
    strength = weight * adapter.strength_of(name)
    return [Placed(term, strength, place, i) for i, term in enumerate(adapter.layers[name].terms)]


def _fused_terms(fused: Adapter, adapters: Sequence[Adapter], name: str) -> list[Placed]:
    """The fused adapter's terms; a live gate's place is that of the term it was taken from."""
    if name not in fused.layers:
        return []
    strength = fused.strength_of(name)
    return [Placed(t, strength, *place_of(t, adapters, name)) for t in fused.layers[name].terms]


def place_of(term: Term, adapters: Sequence[Adapter], name: str) -> tuple[int, int]:
    """(adapter, term) that a fused adapter's live gate was taken from, told by its tensors; else (-1, -1)."""
    if not term.mergeable:
        for place, adapter in enumerate(adapters):
            for index, other in enumerate(adapter.layers[name].terms if name in adapter.layers else ()):
                if same_tensors(other, term):
                    return place, index
    return -1, -1


def _norm(
    plus: Sequence[Placed],
    name: str,
    adapters: Sequence[Adapter],
    inputs: Tensor | Statistics,
    minus: Sequence[Placed] = (),
) -> float:
    """‖(Σ plus − Σ minus) X‖ as a root mean square."""
    shape = next(a.layers[name].shape for a in adapters if name in a.layers)
    signed = [(p, 1.0) for p in plus] + [(p, -1.0) for p in minus]
    if isinstance(inputs, Statistics):
        responses = [response_of(p, shape, inputs, name).scaled(sign) for p, sign in signed]
        return joined(responses).norm(inputs)
    if any(not p.term.mergeable for p, _ in signed):
        raise SpectralAdapterError(
            f"layer {name}: an adaptive gate has no fixed ΔW: freeze the adapter first, or give statistics "
            "that were collected with it"
        )
    return output_norm(concatenate([p.term.factors(shape, p.strength).scaled(g) for p, g in signed]), inputs)


def _ratios(squares: Tensor) -> tuple[tuple[float | None, ...], ...]:
    rows = []
    for i, row in enumerate(squares.tolist()):
        rows.append(tuple((value / row[i]) ** 0.5 if row[i] else None for value in row))
    return tuple(rows)


def retention(
    fused: Adapter,
    adapters: Sequence[Adapter],
    inputs: Sequence[Inputs],
    weights: Sequence[float] | None = None,
) -> Retention:
    """How much of each concept the fused adapter still does; ``weights`` are those of the fusion, 1 by
    default.
    """
    _check_inputs(adapters, inputs)
    weights = [1.0] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters):
        raise SpectralAdapterError(
            f"{len(weights)} weights for {len(adapters)} adapters: expected one for each"
        )
    totals = [(0.0, 0.0)] * len(adapters)
    layers: dict[str, list[float | None]] = {}
    for i, (adapter, given, weight) in enumerate(zip(adapters, inputs, weights, strict=True)):
        for name in given:
            if name not in adapter.layers:
                continue
            alone, seen = _terms(adapters, i, name, weight), given[name]
            lost = _norm(alone, name, adapters, seen, _fused_terms(fused, adapters, name))
            had = _norm(alone, name, adapters, seen)
            layers.setdefault(name, [None] * len(adapters))[i] = _kept(lost**2, had**2)
            totals[i] = (totals[i][0] + lost**2, totals[i][1] + had**2)
    return Retention({n: tuple(v) for n, v in layers.items()}, tuple(_kept(*total) for total in totals))


def _kept(lost: float, had: float) -> float | None:
    return 1 - (lost / had) ** 0.5 if had else None


def _check_inputs(adapters: Sequence[Adapter], inputs: Sequence[Inputs]) -> None:
    if len(inputs) != len(adapters) or not adapters:
        raise SpectralAdapterError(
            f"inputs of {len(inputs)} concepts for {len(adapters)} adapters: expected one mapping for each"
        )
