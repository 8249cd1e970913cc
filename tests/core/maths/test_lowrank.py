"""Low-rank factors: ΔW, sums, the compact SVD and re-compression, on linear and convolution shapes."""

from __future__ import annotations

import pytest
import torch

from spectral_core.maths.layers import LayerShape
from spectral_core.maths.lowrank import Factors, compact_svd, concatenate, delta, recompress

SHAPES = {
    "tall": (11, (6,)),
    "wide": (5, (14,)),
    "conv": (7, (4, 3, 2)),
    "conv 1d": (4, (5, 3)),
    "one": (1, (1,)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def factors(shape: str, rank: int = 4, scale: float = 0.5, seed: int = 0) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    out, inside = SHAPES[shape]
    down = torch.randn(rank, *inside, generator=draw, dtype=torch.float64)
    return Factors(down, torch.randn(out, rank, generator=draw, dtype=torch.float64), scale)


@every_shape
def test_delta_is_the_scaled_product(shape: str) -> None:
    f = factors(shape)
    wanted = 0.5 * torch.einsum("or,r...->o...", f.up, f.down)
    assert torch.allclose(delta(f), wanted, atol=1e-12)
    assert delta(f).shape == f.shape.weight_shape
    assert torch.allclose(delta(f.scaled(-3.0)), -3 * wanted, atol=1e-12)
    assert torch.equal(f.scaled_up(), 0.5 * f.up)


@every_shape
def test_concatenation_is_the_sum(shape: str) -> None:
    terms = [factors(shape, 4, 0.5), factors(shape, 2, -1.5, 1), factors(shape, 1, 1.0, 2)]
    together = concatenate(terms)
    assert together.rank == 7 and together.scale == 1.0
    assert torch.allclose(delta(together), sum(delta(t) for t in terms), atol=1e-12)
    assert concatenate(terms[:1]) is terms[0]


@every_shape
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_compact_svd_is_the_svd(shape: str, rank: int) -> None:
    f = factors(shape, rank)
    u, s, v = compact_svd(f)
    whole = delta(f).flatten(1)
    k = min(rank, *whole.shape)
    assert s.shape == (k,)
    assert torch.allclose(s, torch.linalg.svdvals(whole)[:k], atol=1e-10)
    assert torch.allclose((u * s) @ v.mT, whole, atol=1e-10)
    assert torch.allclose(u.mT @ u, torch.eye(k).double(), atol=1e-10)
    assert torch.allclose(v.mT @ v, torch.eye(k).double(), atol=1e-10)


@every_shape
@pytest.mark.parametrize("kept", [1, 2, 99])
def test_recompression_is_the_best_approximation(shape: str, kept: int) -> None:
    f = factors(shape)
    smaller, error = recompress(f, kept)
    u, s, vh = torch.linalg.svd(delta(f).flatten(1), full_matrices=False)
    best = (u[:, :kept] * s[:kept]) @ vh[:kept]
    assert smaller.rank == min(kept, f.rank, *delta(f).flatten(1).shape)
    assert torch.allclose(delta(smaller).flatten(1), best, atol=1e-10)
    assert error == pytest.approx(float((delta(f) - delta(smaller)).norm() / delta(f).norm()), abs=1e-7)
    assert smaller.up.norm() == pytest.approx(float(smaller.down.norm()))


def test_nothing_stays_nothing() -> None:
    empty = Factors(torch.zeros(0, 6), torch.zeros(5, 0), 2.0)
    assert torch.equal(delta(empty), torch.zeros(5, 6))
    assert recompress(empty, 3) == (empty, 0.0)
    zero = Factors(torch.zeros(2, 6), torch.zeros(5, 2))
    smaller, error = recompress(zero, 1)
    assert error == 0.0 and not delta(smaller).any() and torch.isfinite(smaller.up).all()


def test_autocast_does_not_reach_the_products() -> None:
    f = Factors(torch.randn(8, 64), torch.randn(64, 8))
    exact, (_, values, _) = delta(f), compact_svd(f)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta(f), exact)
        assert torch.equal(compact_svd(f)[1], values)


def test_layer_shapes() -> None:
    shape = LayerShape(8, 3, (5, 2))
    assert (shape.fan_in, shape.max_rank, str(shape)) == (30, 8, "8×3×5×2")
    assert LayerShape.of(torch.empty(8, 3, 5, 2, device="meta")) == shape
