"""Closed-form fusion: the update that does on each concept's inputs what that concept's adapter does there.

    min over ΔW of  Σᵢ E‖sᵢΔWᵢ x − ΔW x‖² + β·E₀‖ΔW x‖²,   x under concept i, and under the base model

is what Mix-of-Show's gradient fusion (Gu et al., NeurIPS 2023, arXiv 2305.18292) descends; it is quadratic,
so its minimiser is known (RegMean, Jin et al., arXiv 2212.09849, for whole weights). With a ridge towards
the average of the K updates:

    exact       ΔW = Σ sᵢΔWᵢ (Cᵢ + (λ/K)I) (ΣCᵢ + βC₀ + λI)⁻¹,            λ = ρ·max(1, n/N)·tr(ΣC)/n
    rank space  ΔW = [s₁B₁ … s_KB_K] Q (G + λI)⁻¹ P,  z = P x,  P = orthonormal rows of all Aᵢ,
                G = Σ E[z zᵀ], Q's block rows E[Aᵢx zᵀ],                  λ = ρ'·tr(G)/dim

N is the fewest tokens that a concept has shown; below n of them the ridge grows, because the moments are then
known less well. Both forms have the rank Σr: the columns of all updates, with new rows. An adaptive gate
enters by what its gated rows did, E[g xᵀ], in place of AᵢCᵢ, and by its mean opening in the ridge; the result
has no gate.

Shapes: see :mod:`..statistics.moments`; up (out, R), rows (R, fan_in), R the ranks of all sources together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter.adapter import Term
from ..maths.lowrank import Factors
from ..statistics.moments import Response, Statistics, mean_rows, response_of, row_basis
from .activations import total_moment
from .linear import Combined, plain_term
from .options import FusionOptions
from .sources import LayerSources, Source

_NEGLIGIBLE = 1e-6  # of the largest eigenvalue, where λ = 0: sums in float32 know no more


@dataclass(frozen=True)
class Problem:
    """min E‖y − ΔW x‖² over ΔW = up·rows: ``cross`` E[v xᵀ] with y = up·v, ``total`` ΣC + βC₀.

    ``prior`` (R, d): the rows of the average update. ``basis``: what d means, nothing for fan_in itself.
    """

    up: Tensor
    cross: Tensor
    total: Tensor
    prior: Tensor
    basis: Tensor | None

    def rows(self, lam: float, to_prior: bool) -> Tensor:
        """(cross + λ·prior)(total + λI)⁻¹, with the pseudo-inverse for λ = 0: (R, fan_in)."""
        if lam > 0:
            target = self.cross + lam * self.prior if to_prior else self.cross
            found = torch.cholesky_solve(target.mT, torch.linalg.cholesky(_lifted(self.total, lam))).mT
        else:
            values, vectors = torch.linalg.eigh(self.total)
            kept = values > _NEGLIGIBLE * values[-1].clamp(min=0)
            vectors = vectors[:, kept]
            found = (self.cross @ vectors / values[kept]) @ vectors.mT
        return found if self.basis is None else found @ self.basis.to(found)

    def mean_moment(self) -> float:
        """tr(total) / d."""
        return float(self.total.trace()) / self.total.shape[0]


def _lifted(moment: Tensor, lam: float) -> Tensor:
    """moment + λI: on its own, so that it is gone before the system is solved."""
    moment = moment.clone()
    moment.diagonal().add_(lam)
    return moment


def problem_of(layer: LayerSources, options: FusionOptions, in_rank_space: bool = False) -> Problem:
    """A layer's objective, in float64."""
    given = dict(layer.inputs)
    if in_rank_space:
        basis = row_basis([s.term.factors(layer.shape).down for s in layer.sources])
        given = {place: statistics.within(basis) for place, statistics in given.items()}
    concepts = {place: statistics for place, statistics in given.items() if place >= 0}
    responses = [_response(source, layer, given[source.adapter]) for source in layer.sources]
    pairs = list(zip(layer.sources, responses, strict=True))
    total = total_moment(concepts.values())
    if -1 in given:
        total = total + options.base_weight * given[-1].second_moment.to(total)
    first = next(iter(given.values()))
    return Problem(
        up=torch.cat([response.up for _, response in pairs], 1),
        cross=torch.cat([response.cross(given[source.adapter]) for source, response in pairs]),
        total=total,
        prior=torch.cat([mean_rows(s.placed(), layer.shape, given[s.adapter]) for s, _ in pairs])
        / layer.concepts,
        basis=first.basis,
    )


def _response(source: Source, layer: LayerSources, statistics: Statistics) -> Response:
    return response_of(source.placed(), layer.shape, statistics, layer.name)


def closed_form_layer(layer: LayerSources, options: FusionOptions) -> Combined:
    """The exact form; the one in rank space for statistics that allow no other, or below ``exact_from``."""
    fewest = min(statistics.count for place, statistics in layer.inputs.items() if place >= 0)
    reduced = any(s.basis is not None for s in layer.inputs.values())
    if reduced or fewest < options.exact_from * layer.shape.fan_in:
        note = "" if reduced else f"in rank space: {fewest} tokens for a width of {layer.shape.fan_in}"
        return replace(closed_form_rank_layer(layer, options), note=note)
    problem = problem_of(layer, options)
    lam = options.ridge * max(1.0, layer.shape.fan_in / max(fewest, 1)) * problem.mean_moment()
    return _solved(problem, lam, True, "closed-form", layer)


def closed_form_rank_layer(layer: LayerSources, options: FusionOptions) -> Combined:
    """The form in rank space."""
    problem = problem_of(layer, options, in_rank_space=True)
    lam = options.rank_ridge * problem.mean_moment()
    return _solved(problem, lam, False, "closed-form in rank space", layer)


def _solved(problem: Problem, lam: float, to_prior: bool, form: str, layer: LayerSources) -> Combined:
    return Combined((low_rank(problem.up, problem.rows(lam, to_prior), layer),), form)


def low_rank(up: Tensor, rows: Tensor, layer: LayerSources) -> Term:
    """up·rows as a plain term in the precision and on the device of the layer's sources."""
    like = layer.sources[0].term.factors(layer.shape).up
    wide = any(s.term.factors(layer.shape).up.dtype == torch.float64 for s in layer.sources)
    dtype = torch.float64 if wide else torch.float32
    down = rows.reshape(len(rows), layer.shape.in_features, *layer.shape.kernel)
    return plain_term(Factors(down.to(like.device, dtype), up.to(like.device, dtype)))
