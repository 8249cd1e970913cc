"""Data-free merging methods from the literature, on dense updates of one layer: candidates for the product.

Written from the papers' formulas; :mod:`tests.core.fusion.test_fusion_candidates` checks TIES and DARE
against PEFT.

    sum, average     Σ ΔWᵢ, Σ ΔWᵢ/K
    ties             trim to the largest entries, elect signs, average what agrees (arXiv 2306.01708)
    dare             drop entries at random, rescale the rest, add up (arXiv 2311.03099)
    iso_c            the sum with all its singular values equal to their mean (arXiv 2502.04959)
    svc              the sum with singular values divided by how often a direction was counted (2602.05536)
    tsv              singular vectors of all updates, whitened against each other (arXiv 2412.00081)
    core_ties, core_iso   the same in the core space of all rows and columns (arXiv 2509.17786)
    subspaces        min Σᵢ ‖(ΔW − ΔWᵢ) ΔWᵢᵀ‖²/‖ΔWᵢ‖², solved instead of descended (WUDI, arXiv 2503.08099)
    null_space       each update off the others' leading rows, softly (NP-LoRA, arXiv 2511.11051)

Shapes: updates (K, out, in), results (out, in), float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ROUNDING = 1e-5  # of the largest singular value: what the adapters' float32 leaves beyond an update's rank


def summed(updates: Tensor) -> Tensor:
    return updates.sum(0)


def average(updates: Tensor) -> Tensor:
    return updates.mean(0)


def ties(updates: Tensor, density: float = 0.5) -> Tensor:
    """Trim, elect by total mass, average over those that agree."""
    kept = max(int(density * updates[0].numel()), 1)
    trimmed = []
    for update in updates:
        mask = torch.zeros(update.numel(), dtype=update.dtype)
        mask[update.abs().flatten().topk(kept).indices] = 1
        trimmed.append(update * mask.reshape(update.shape))
    stacked = torch.stack(trimmed)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = (stacked.sign() == elected).to(updates.dtype)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def dare(updates: Tensor, density: float = 0.5, seed: int = 0) -> Tensor:
    """Each entry kept with probability ``density`` and divided by it."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(updates.shape, generator=generator, dtype=updates.dtype) < density
    return (updates * kept / density).sum(0)


def iso_c(updates: Tensor, scale: float = 1.0) -> Tensor:
    """Over the sum's own rank: the singular values beyond it are rounding."""
    u, s, vh = torch.linalg.svd(updates.sum(0), full_matrices=False)
    rank = int((s > ROUNDING * s[0]).sum())
    return scale * s[:rank].mean() * u[:, :rank] @ vh[:rank]


def svc(updates: Tensor) -> Tensor:
    """σ_r divided by the mean over i of max(1, ⟨u_rᵀM, u_rᵀΔWᵢ⟩ / ‖u_rᵀΔWᵢ‖²)."""
    u, s, vh = torch.linalg.svd(updates.sum(0), full_matrices=False)
    rank = int((s > ROUNDING * s[0]).sum())
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    own = torch.einsum("mr,kmn->krn", u, updates)
    energy = own.square().sum(-1)
    present = energy > 1e-20 * energy.max()  # elsewhere an update has no share in the direction, and no say
    share = torch.where(present, (own * (s[:, None] * vh)).sum(-1) / energy.where(present, energy.max()), 1.0)
    return (u * (s / share.clamp(min=1).mean(0))) @ vh


def tsv(updates: Tensor) -> Tensor:
    """U_⊥ Σ V_⊥ᵀ, U_⊥ the orthogonal matrix nearest to all updates' left vectors side by side."""
    found = [torch.linalg.svd(update, full_matrices=False) for update in updates]
    ranks = [int((s > ROUNDING * s[0]).sum()) for _, s, _ in found]
    u = torch.cat([f[0][:, :r] for f, r in zip(found, ranks, strict=True)], 1)
    s = torch.cat([f[1][:r] for f, r in zip(found, ranks, strict=True)])
    vh = torch.cat([f[2][:r] for f, r in zip(found, ranks, strict=True)])
    return (_polar(u) * s) @ _polar(vh)


def _polar(matrix: Tensor) -> Tensor:
    p, _, qh = torch.linalg.svd(matrix, full_matrices=False)
    return p @ qh


def in_core_space(merge: Callable[[Tensor], Tensor], updates: Tensor) -> Tensor:
    """``merge`` in the coordinates of the orthonormal bases of all columns and all rows together."""
    u, s, _ = torch.linalg.svd(torch.cat(list(updates), 1), full_matrices=False)
    _, t, vh = torch.linalg.svd(torch.cat(list(updates)), full_matrices=False)
    u, vh = u[:, s > ROUNDING * s[0]], vh[t > ROUNDING * t[0]]
    return u @ merge(u.mT @ updates @ vh.mT) @ vh


def subspaces(updates: Tensor, ridge: float = 0.0, power: float = 1.0) -> Tensor:
    """Σ ΔWᵢ(Cᵢ + λ/K)(ΣCᵢ + λ)⁻¹ with Cᵢ = (ΔWᵢᵀΔWᵢ)^power/tr, λ = ridge·tr(ΣC)/rank; on the rows only.

    With power 0, Cᵢ is the projector on the update's rows over its rank.
    """
    _, t, vh = torch.linalg.svd(torch.cat(list(updates)), full_matrices=False)
    basis = vh[t > ROUNDING * t[0]]
    inside = updates @ basis.mT
    moments = []
    for update in inside:
        _, s, wh = torch.linalg.svd(update, full_matrices=False)
        s, wh = s[s > ROUNDING * s[0]], wh[s > ROUNDING * s[0]]
        weight = s**2 if power == 1.0 else s ** (2 * power)
        moments.append((wh.mT * (weight / weight.sum())) @ wh)
    total = torch.stack(moments).sum(0)
    lam = max(ridge, 1e-12) * total.trace() / len(total)
    eye = torch.eye(len(total), dtype=total.dtype)
    target = sum(u @ (c + lam / len(updates) * eye) for u, c in zip(inside, moments, strict=True))
    return torch.linalg.solve(total + lam * eye, target, left=False) @ basis


def null_space(updates: Tensor, strength: float = 1.0) -> Tensor:
    """Σ ΔWᵢ(I − s·P₋ᵢ), P₋ᵢ the projector on the other updates' rows."""
    total = torch.zeros_like(updates[0])
    for i, update in enumerate(updates):
        others = torch.cat([u for j, u in enumerate(updates) if j != i])
        _, s, vh = torch.linalg.svd(others, full_matrices=False)
        rows = vh[s > ROUNDING * s[0]]
        total += update - strength * (update @ rows.mT) @ rows
    return total


CANDIDATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": summed,
    "average": average,
    "ties 0.2": lambda u: ties(u, 0.2),
    "ties 0.5": lambda u: ties(u, 0.5),
    "ties 1.0": lambda u: ties(u, 1.0),
    "dare 0.5": lambda u: dare(u, 0.5),
    "iso-c": iso_c,
    "svc": svc,
    "tsv": tsv,
    "core ties 0.5": lambda u: in_core_space(lambda c: ties(c, 0.5), u),
    "core ties 1.0": lambda u: in_core_space(lambda c: ties(c, 1.0), u),
    "wudi": subspaces,
    "wudi, ridge 1": lambda u: subspaces(u, 1.0),
    "wudi, ridge 10": lambda u: subspaces(u, 10.0),
    "wudi, C^½, ridge 0.3": lambda u: subspaces(u, 0.3, 0.5),
    "projectors, ridge 0.1": lambda u: subspaces(u, 0.1, 0.0),
    "projectors, ridge 0.3": lambda u: subspaces(u, 0.3, 0.0),
    "projectors, ridge 1": lambda u: subspaces(u, 1.0, 0.0),
    "sum × 0.4": lambda u: 0.4 * u.sum(0),
    "null space": null_space,
    "null space ½": lambda u: null_space(u, 0.5),
}
