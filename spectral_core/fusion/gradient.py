"""Gradient fusion as a reference: L-BFGS on the objective whose minimiser :mod:`.closed_form` computes.

Mix-of-Show (Gu et al., NeurIPS 2023, arXiv 2305.18292) descends it with the layer's whole weight. Started at
the average, every iterate stays in the columns of the updates, and L-BFGS does not change under an
orthonormal change of variables; so ΔW = Q·X with Q an orthonormal basis of those columns goes the same way
with a far smaller X (but for the length of PyTorch's first trial step, which depends on the coordinates).

Shapes: Q (out, R), X (R, d), see :mod:`..statistics.moments`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .closed_form import low_rank, problem_of
from .linear import Combined
from .options import FusionOptions
from .sources import LayerSources

_MEMORY = 10


def gradient_layer(layer: LayerSources, options: FusionOptions) -> Combined:
    """``options.iterations`` steps from the average."""
    problem = problem_of(layer, options)
    q, r = torch.linalg.qr(problem.up)
    x = descend(r @ problem.prior, r @ problem.cross, problem.total, options.iterations)
    rows = x if problem.basis is None else x @ problem.basis.to(x)
    return Combined((low_rank(q, rows, layer),), "gradient")


def descend(start: Tensor, cross: Tensor, total: Tensor, iterations: int) -> Tensor:
    """X after L-BFGS with a strong-Wolfe line search on tr(X S Xᵀ) − 2 tr(X Bᵀ), S = total, B = cross."""
    x = start.clone().requires_grad_(True)
    # the mean square of the targets' scale: without it the first step is too long or too short by orders
    unit = 1.0 / total.diagonal().mean().clamp(min=torch.finfo(total.dtype).tiny)
    optimiser = torch.optim.LBFGS(
        [x],
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=_MEMORY,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        with torch.no_grad():
            product = x @ total
            x.grad = 2 * unit * (product - cross)
            return unit * ((product - 2 * cross) * x).sum()

    optimiser.step(closure)
    return x.detach()
