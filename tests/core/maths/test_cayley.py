"""The Cayley transform: orthogonality, its formula, small angles, gradients."""

from __future__ import annotations

import pytest
import torch

from spectral_core.errors import SpectralAdapterError
from spectral_core.maths.cayley import cayley_minus_identity, skew_from_entries, skew_size


def cayley(entries: torch.Tensor, r: int) -> torch.Tensor:
    """R = I + K."""
    k = cayley_minus_identity(entries, r)
    return torch.eye(r, dtype=k.dtype) + k


def entries(r: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(r)
    return (scale * torch.randn(skew_size(r), generator=g, dtype=torch.float64)).to(dtype)


def test_packing_is_the_upper_triangle_row_by_row() -> None:
    q = skew_from_entries(torch.tensor([1.0, 2.0, 3.0]), 3)
    assert q.tolist() == [[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]


@pytest.mark.parametrize("r", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rotation(r: int, scale: float, dtype: torch.dtype) -> None:
    given = entries(r, scale, dtype)
    rotation = cayley(given, r)
    assert rotation.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = rotation.double()
    torch.testing.assert_close(wide.T @ wide, torch.eye(r).double(), rtol=0, atol=2e-6)
    assert torch.linalg.det(wide).item() == pytest.approx(1, abs=1e-5)
    q = skew_from_entries(given.double(), r)
    published = (torch.eye(r) + q) @ torch.linalg.inv(torch.eye(r) - q)
    torch.testing.assert_close(wide, published, rtol=0, atol=3e-6)


def test_small_angles_survive_in_float32() -> None:
    given = entries(6, 1e-6)
    exact = cayley_minus_identity(given, 6)
    got = cayley_minus_identity(given.float(), 6).double()
    assert torch.linalg.norm(got - exact) / torch.linalg.norm(exact) < 1e-6


def test_zero_is_exactly_the_identity() -> None:
    assert torch.equal(cayley_minus_identity(torch.zeros(10), 5), torch.zeros(5, 5))
    assert torch.equal(cayley(torch.zeros(10), 5), torch.eye(5))


def test_singular_values_survive_a_rotation() -> None:
    s = torch.tensor([3.0, 2.0, 0.5, 0.1]).double()
    turned = cayley(entries(4), 4) @ torch.diag(s) @ cayley(entries(4, 0.4), 4).T
    torch.testing.assert_close(torch.linalg.svdvals(turned), s)


def test_gradients() -> None:
    for scale in (0.0, 0.7):
        given = entries(5, scale).requires_grad_()
        assert torch.autograd.gradcheck(lambda e: cayley_minus_identity(e, 5), (given,))


def test_autocast_changes_nothing() -> None:
    given = entries(8, 0.3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cayley_minus_identity(given, 8)
    assert torch.equal(inside, cayley_minus_identity(given, 8))


@pytest.mark.parametrize(("shape", "r"), [((3,), 4), ((7,), 4), ((2, 3), 4), ((0,), 0)])
def test_wrong_size_is_refused(shape: tuple[int, ...], r: int) -> None:
    with pytest.raises(SpectralAdapterError, match="expected"):
        cayley(torch.zeros(shape), r)
