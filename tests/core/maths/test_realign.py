"""The compact basis: frozen bits, and bases that are the same, rounded, fine-tuned or foreign."""

from __future__ import annotations

import pytest
import torch

from spectral_core.errors import SpectralAdapterError
from spectral_core.maths.cayley import cayley_minus_identity
from spectral_core.maths.realign import Realigned, candidates, judge, project_basis, realign, sign_rows
from spectral_core.maths.svd import Columns, SVDColumns, select_columns

SEED = 20240527
FROZEN = ["--+--+--+++--++-", "++--+++++--+--++"]


def base(m: int = 160, n: int = 130, seed: int = 0, s: torch.Tensor | None = None) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0]
    spectrum = torch.arange(1, k + 1, dtype=torch.float64) ** -0.6 if s is None else s
    return ((u * spectrum) @ v.T).float()


def update(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """ΔW of Spectral R with fixed non-zero generators: U (K_U S + S K_Vᵀ + K_U S K_Vᵀ) Vᵀ."""
    r = s.numel()
    g = torch.Generator().manual_seed(7)
    k_u, k_v = (
        cayley_minus_identity(torch.randn(r * (r - 1) // 2, generator=g, dtype=torch.float64) * 0.3, r)
        for _ in range(2)
    )
    d = torch.diag(s.double())
    return u.double() @ (k_u @ d + d @ k_v.T + k_u @ d @ k_v.T) @ v.double().T


def trip(
    weight: torch.Tensor, other: torch.Tensor, columns: Columns, stored: SVDColumns | None = None
) -> tuple[Realigned, float]:
    """Store on ``weight``, load on ``other``: the result and the relative error of ΔW."""
    stored = select_columns(weight, columns) if stored is None else stored
    p_u, p_v = project_basis(stored.u, stored.v, SEED)
    assert p_u.shape == p_v.shape == (stored.s.numel() + 16, stored.s.numel()) and p_u.dtype == torch.float32
    got = realign(other, stored.s, p_u, p_v, SEED, columns)
    wanted = update(stored.u, stored.s, stored.v)
    error = torch.linalg.norm(update(got.u, got.s, got.v) - wanted) / torch.linalg.norm(wanted)
    return got, error.item()


def test_the_bits_are_frozen() -> None:
    """Files depend on these. The second line is SplitMix64's published sequence for the state 1234567."""
    from spectral_core.maths.realign import _splitmix64, np

    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + (i + 1) * gamma) % 2**64 for i in range(3)], dtype=np.uint64)
    assert _splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    rows = sign_rows(SEED, 0, 2, 16)
    text = ["".join("+" if x > 0 else "-" for x in row) for row in rows.tolist()]
    assert text == FROZEN
    assert not torch.equal(sign_rows(SEED, 1, 2, 16), rows) and set(rows.unique().tolist()) == {-1.0, 1.0}
    assert abs(sign_rows(2**64 - 1, 0, 100, 1000).mean().item()) < 0.02


COLUMNS = [Columns.block(0, 8), Columns.block(1, 8), Columns.block(6, 6), Columns.listed([0, 9, 4]),
           Columns.bottom(3)]  # fmt: skip


@pytest.mark.parametrize("columns", COLUMNS, ids=str)
def test_the_same_base(columns: Columns) -> None:
    got, error = trip(base(), base(), columns)
    assert got.verdict == "same" and got.residual < 1e-5 and got.scale_error < 1e-5 and error < 1e-4


@pytest.mark.parametrize("columns", COLUMNS[:4], ids=str)
@pytest.mark.parametrize(
    ("dtype", "verdicts"),
    [
        (torch.float16, ("same",)),
        (torch.bfloat16, ("same", "warn")),
        (torch.float8_e4m3fn, ("warn", "refuse")),
    ],
    ids=str,
)
def test_rounded_bases(dtype: torch.dtype, verdicts: tuple[str, ...], columns: Columns) -> None:
    scaled = base() * 8  # away from float8's smallest numbers
    got, error = trip(scaled, scaled.to(dtype), columns)
    assert got.verdict in verdicts
    assert error <= 4 * got.residual


def test_fine_tunes_and_foreign_models() -> None:
    weight, noise = base(), torch.randn(160, 130, generator=torch.Generator().manual_seed(4))
    noise *= torch.linalg.norm(weight) / torch.linalg.norm(noise)
    light, light_error = trip(weight, weight + 0.05 * noise, Columns.block(0, 8))
    assert light.verdict == "warn" and light_error <= 4 * light.residual
    heavy, _ = trip(weight, weight + 0.5 * noise, Columns.block(0, 8))
    assert heavy.verdict == "refuse" and heavy.residual > 0.1
    foreign, _ = trip(weight, base(seed=9), Columns.block(0, 8))
    assert foreign.verdict == "refuse" and foreign.residual > 0.7


def test_near_degenerate_groups_come_back() -> None:
    """Rounding alone rotates such a group freely: re-deriving the basis fails where re-aligning does not."""
    s = torch.arange(1, 131, dtype=torch.float64) ** -0.6
    s[1:5] = 0.6 + 1e-7 * torch.arange(4)
    weight, columns = base(s=s), Columns.block(0, 8)
    other = weight.half().float()
    got, error = trip(weight, other, columns)
    assert got.residual < 2e-3 and error < 5e-3
    stored, again = select_columns(weight, columns), select_columns(other, columns)
    wanted = update(stored.u, stored.s, stored.v)
    naive = torch.linalg.norm(update(again.u, stored.s, again.v) - wanted) / torch.linalg.norm(wanted)
    assert naive > 20 * error


def test_signs_come_back() -> None:
    weight, columns = base(), Columns.block(0, 6)
    found = select_columns(weight, columns)
    sign = torch.tensor([1.0, -1, -1, 1, -1, 1])
    flipped = SVDColumns(found.u * sign, found.s, found.v * sign, found.columns, found.solver, found.residual)
    got, error = trip(weight, weight, columns, flipped)
    assert got.verdict == "same" and error < 1e-5
    torch.testing.assert_close(got.u, flipped.u, rtol=0, atol=1e-5)


def test_a_scaled_base_is_noticed() -> None:
    got, _ = trip(base(), 1.01 * base(), Columns.block(0, 6))
    assert got.verdict == "warn" and got.scale_error == pytest.approx(0.01, rel=1e-2)


def test_a_weight_of_exactly_the_rank() -> None:
    s = torch.zeros(130, dtype=torch.float64)
    s[:6] = 1 / torch.arange(1, 7)
    got, error = trip(base(s=s), base(s=s).half(), Columns.block(0, 6))
    assert got.verdict == "same" and error < 2e-3


def test_candidates_stay_determined() -> None:
    assert candidates((0, 1), 100) == tuple(range(10))
    assert candidates((40, 41), 100) == tuple(range(32, 50))
    assert candidates((98, 99), 100) == tuple(range(90, 100))
    for spread in ((0, 20, 40, 60, 80), tuple(range(0, 100, 3))):
        assert set(spread) <= set(candidates(spread, 100))
        assert len(candidates(spread, 100)) <= len(spread) + 16


@pytest.mark.parametrize(
    ("residual", "scale", "verdict"),
    [(5e-3, 5e-4, "same"), (5e-3, 6e-4, "warn"), (6e-3, 0.0, "warn"), (5e-2, 1.0, "warn"),
     (6e-2, 0.0, "refuse"), (float("nan"), 0.0, "refuse")],
)  # fmt: skip
def test_verdicts(residual: float, scale: float, verdict: str) -> None:
    assert judge(residual, scale) == verdict


def test_what_is_refused() -> None:
    weight, columns = base(30, 20), Columns.block(0, 4)
    found = select_columns(weight, columns)
    p_u, p_v = project_basis(found.u, found.v, 0)
    for bad in (
        lambda: project_basis(found.u, found.v[:, :3], 0), lambda: project_basis(found.u, found.v, 0, 3),
        lambda: project_basis(found.u, found.v, -1),
        lambda: realign(weight, found.s[:3], p_u, p_v, 0, columns),
        lambda: realign(weight, found.s, p_u[:9], p_v, 0, columns),
        lambda: realign(weight, found.s, p_u[:4], p_v[:4], 0, columns),
    ):  # fmt: skip
        with pytest.raises(SpectralAdapterError):
            bad()
