"""Singular columns against the full SVD in float64: spectra × shapes × column choices, refusals, purity."""

from __future__ import annotations

import math

import pytest
import torch

from spectral_core.errors import SpectralAdapterError
from spectral_core.maths import svd_solvers
from spectral_core.maths.svd import Columns, SVDColumns, as_matrix, select_columns, top_columns


def planted(m: int, n: int, s: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float64 matrix with the given singular values."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0]
    return (u * s[:k]) @ v.T


def index(k: int) -> torch.Tensor:
    return torch.arange(1, k + 1, dtype=torch.float64)


def flat(k: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.linalg.svdvals(torch.randn(k, k, generator=g, dtype=torch.float64))


SPECTRA = {
    "power 1": lambda k: 1 / index(k),
    "power 0.5": lambda k: index(k) ** -0.5,
    "power 0.3": lambda k: index(k) ** -0.3,
    "power 2": lambda k: index(k) ** -2,
    "steep": lambda k: 0.2 ** index(k) + 1e-14,
    "flat random": flat,
    "close pair": lambda k: torch.cat([torch.tensor([2.0, 2.0 - 1e-7]).double(), 1 / index(k)]),
    "tiny": lambda k: 1e-20 / index(k),
    "huge": lambda k: 1e18 / index(k),
}
SHAPES = [(64, 64), (260, 260), (280, 110), (110, 280), (233, 207)]


def angle(found: torch.Tensor, true: torch.Tensor) -> float:
    """Sine of the largest principal angle."""
    wide = found.double()
    return torch.linalg.matrix_norm(wide - true @ (true.T @ wide), 2).item()


def check(weight: torch.Tensor, got: SVDColumns, limit: float = 1e-4) -> None:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    picked = list(got.columns)
    assert max(angle(got.u, u[:, picked]), angle(got.v, vh[picked].T)) <= limit
    torch.testing.assert_close(got.s.double(), s[picked], rtol=1e-5, atol=0)
    for basis in (got.u, got.v):
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(picked)), rtol=0, atol=3e-6)
    assert (got.u.gather(0, got.u.abs().argmax(0, keepdim=True)) > 0).all()
    product = weight.double() @ got.v.double()  # u and v belong together, pair by pair
    torch.testing.assert_close(product, got.u.double() * got.s.double(), rtol=0, atol=2e-4 * s[0].item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_top_columns_match_the_full_svd(spectrum: str, shape: tuple[int, int]) -> None:
    weight = planted(*shape, SPECTRA[spectrum](min(shape))).float()
    got = top_columns(weight, 6)
    assert got.u.shape == (shape[0], 6) and got.v.shape == (shape[1], 6) and got.columns == tuple(range(6))
    assert got.u.dtype == got.s.dtype == got.v.dtype == torch.float32
    check(weight, got)


@pytest.mark.parametrize(
    "columns",
    [Columns.block(1, 5), Columns.block(3, 4), Columns.listed([7, 0, 3]), Columns.listed([150]),
     Columns.bottom(4)],
    ids=lambda c: str(c.indices or -c.last),
)  # fmt: skip
@pytest.mark.parametrize("shape", [(210, 180), (180, 210)], ids=str)
def test_chosen_columns(columns: Columns, shape: tuple[int, int]) -> None:
    weight = planted(*shape, 1 / index(180)).float()
    got = select_columns(weight, columns)
    assert got.columns == columns.resolve(180)
    check(weight, got, limit=1e-3)  # float32 entries alone move columns this close together
    assert got.solver == ("full" if max(got.columns) >= 90 else got.solver)


def test_the_solver_follows_the_spectrum() -> None:
    assert top_columns(planted(384, 384, SPECTRA["power 1"](384)).float(), 8).solver == "randomised"
    assert top_columns(planted(384, 384, SPECTRA["flat random"](384)).float(), 8).solver == "gram"
    assert top_columns(planted(40, 50, SPECTRA["power 1"](40)).float(), 8).solver == "gram"


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_residual_bounds_the_true_angle(spectrum: str) -> None:
    weight = planted(300, 280, SPECTRA[spectrum](280))
    accepted = svd_solvers.randomised(weight, tuple(range(5)), 8, 1e-4, weight.float())
    if accepted is None:
        assert spectrum in ("flat random", "power 0.3", "huge")
        return
    found, eta = accepted
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    true_angle = max(angle(found.u[:5].T, u[:, :5]), angle(found.v[:5].T, vh[:5].T))
    assert true_angle <= eta + 1e-13 and eta <= 1e-4


def test_a_poor_basis_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the Krylov steps claim, the float64 residual decides."""
    weight = planted(384, 384, SPECTRA["power 0.3"](384)).float()
    block = torch.randn(14, 384, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(svd_solvers, "krylov_basis", lambda *_: (block, False))
    got = top_columns(weight, 6)
    assert got.solver == "gram"
    check(weight, got)


def test_eta_is_the_published_formula() -> None:
    weight = planted(50, 40, SPECTRA["power 1"](40))
    g = torch.Generator().manual_seed(1)
    basis = svd_solvers.orthonormal_rows(torch.randn(12, 40, generator=g, dtype=torch.float64))
    found, eta, _ = svd_solvers.rayleigh_ritz(weight, basis, (0, 1, 2))
    u, s, v = found.u[:3].T, found.s[:3], found.v[:3].T
    square = (weight @ v - u * s).square().sum() + (weight.T @ u - v * s).square().sum()
    assert eta == pytest.approx(math.sqrt(square) / (found.s[2] - found.s[3]).item(), rel=1e-9)


def test_clusters_wider_than_the_rank_are_reported() -> None:
    s = torch.cat([torch.ones(10).double(), 0.1 / index(290)])
    got = top_columns(planted(300, 300, s), 6)  # float32 would split the cluster
    assert got.residual > 1e-4 and got.solver == "gram"


def test_rank_deficient() -> None:
    weight = planted(300, 280, torch.cat([1 / index(6), torch.zeros(274).double()])).float()
    check(weight, top_columns(weight, 6))
    with pytest.raises(SpectralAdapterError, match="numerically zero"):
        top_columns(weight, 9)
    with pytest.raises(SpectralAdapterError, match="numerically zero"):
        select_columns(weight, Columns.bottom(2))
    with pytest.raises(SpectralAdapterError, match="zero everywhere"):
        top_columns(torch.zeros(30, 40), 2)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (3, 3), (5, 9)], ids=str)
def test_all_columns_of_small_matrices(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    got = top_columns(weight, min(shape))
    check(weight, got)
    torch.testing.assert_close((got.u * got.s) @ got.v.T, weight, rtol=1e-5, atol=1e-5)
    assert got.residual < 1e-8


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str
)
def test_dtypes_and_convolutions(dtype: torch.dtype) -> None:
    weight = planted(24, 45, 1 / index(24)).reshape(24, 5, 3, 3).to(dtype)
    got = top_columns(weight, 3)
    assert got.v.shape == (45, 3) and got.u.dtype == torch.float32
    check(weight.double().flatten(1), got)


def test_deterministic_pure_and_usable_for_training() -> None:
    weight = planted(260, 250, 1 / index(250)).float()
    kept = weight.clone()
    state = torch.get_rng_state()
    first, second = top_columns(weight, 4), top_columns(weight.requires_grad_(), 4)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in "usv")
    assert torch.equal(weight, kept) and torch.equal(torch.get_rng_state(), state)
    assert not first.u.requires_grad and not second.u.requires_grad
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        third = top_columns(weight.detach().clone(), 4)
    torch.testing.assert_close(third.u, first.u, rtol=0, atol=1e-5)
    parameter = torch.ones(4, requires_grad=True)
    (third.u * parameter).sum().backward()  # an inference tensor could not be saved for this
    assert parameter.grad is not None


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((8, 9), float("nan")), "NaN"),
        (torch.eye(8).index_fill(0, torch.tensor([3]), float("inf")), "NaN or infinite"),
        (torch.empty(8, 8, device="meta"), "meta"),
        (torch.ones(8), "expected \\(out, in\\)"),
        (torch.ones(0, 8), "not empty"),
        (torch.ones(8, 8, dtype=torch.int8), "floating-point"),
    ],
)
def test_weights_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(SpectralAdapterError, match=message):
        top_columns(weight, 2)


def test_columns_refused() -> None:
    for bad in (
        lambda: Columns.block(-1, 2), lambda: Columns.block(0, 0), lambda: Columns.bottom(0), Columns,
        lambda: Columns.listed([]), lambda: Columns.listed([1, 1]), lambda: Columns.listed([-1]),
        lambda: Columns((0,), 1), lambda: Columns.bottom(9).resolve(8),
        lambda: Columns.block(2, 3).resolve(8), lambda: top_columns(torch.eye(8), 2, oversample=7),
        lambda: top_columns(torch.eye(8), 2, tolerance=0.0),
    ):  # fmt: skip
        with pytest.raises(SpectralAdapterError):
            bad()
    assert Columns.block(2, 3).resolve(9) == (6, 7, 8)
    assert Columns.listed([5, 2]).resolve(6) == (5, 2)
    assert Columns.bottom(3).resolve(9) == (6, 7, 8)


def test_as_matrix_is_a_view() -> None:
    weight = torch.randn(4, 3, 2, 2)
    assert as_matrix(weight).shape == (4, 12) and as_matrix(weight).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("shape", [(300, 170), (128, 90), (40, 260)], ids=str)
def test_a_narrow_weight_is_widened_block_by_block(shape: tuple[int, int]) -> None:
    weight = planted(*shape, 1 / index(min(shape))).float()
    rows = torch.randn(5, shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for given, narrow in ((rows, weight), (rows, weight.mT.contiguous().mT)):
        found = svd_solvers.times(given, narrow)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, given @ weight.double(), rtol=1e-12, atol=1e-12)
