"""The merging candidates of the benchmark against PEFT and against what defines them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality import merge_candidates as candidates


def low_rank(seed: int, rank: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((9, rank), (rank, 11)))
    return up @ down


UPDATES = torch.stack([low_rank(i) for i in range(3)])


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_pefts(density):
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    theirs = merge_utils.ties(list(UPDATES), torch.ones(3, dtype=torch.float64), density)
    assert torch.allclose(candidates.ties(UPDATES, density), theirs)


def test_dare_keeps_pefts_values_at_its_own_places(monkeypatch):
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    generator = torch.Generator().manual_seed(4)
    masks = (torch.rand(UPDATES.shape, generator=generator, dtype=torch.float64) < 0.4).double()
    given = iter(masks)
    monkeypatch.setattr(torch, "bernoulli", lambda input: next(given))
    theirs = merge_utils.dare_linear(list(UPDATES), torch.ones(3, dtype=torch.float64), 0.4)
    assert torch.allclose(candidates.dare(UPDATES, 0.4, seed=4), theirs)


def test_iso_c_has_equal_singular_values():
    s = torch.linalg.svdvals(candidates.iso_c(UPDATES))
    own = torch.linalg.svdvals(UPDATES.sum(0))
    assert torch.allclose(s[:6], own[:6].mean().expand(6)) and float(s[6:].max()) < 1e-9


def test_svc_counts_a_shared_update_once_and_leaves_orthogonal_ones_alone():
    assert torch.allclose(candidates.svc(UPDATES[:1].expand(3, -1, -1)), UPDATES[0])
    u, v = torch.linalg.qr(low_rank(7, 9))[0], torch.linalg.qr(low_rank(8, 9).mT)[0]
    apart = torch.stack([3 * u[:, :2] @ v[:, :2].mT, 2 * u[:, 2:4] @ v[:, 2:4].mT])
    assert torch.allclose(candidates.svc(apart), apart.sum(0))


def test_tsv_is_the_sum_of_orthogonal_updates():
    u, v = torch.linalg.qr(low_rank(7, 9))[0], torch.linalg.qr(low_rank(8, 9).mT)[0]
    apart = torch.stack([3 * u[:, :2] @ v[:, :2].mT, 2 * u[:, 2:4] @ v[:, 2:4].mT])
    assert torch.allclose(candidates.tsv(apart), apart.sum(0))
    assert not torch.allclose(candidates.tsv(UPDATES), UPDATES.sum(0), rtol=1e-2)


def test_core_space_is_lossless_for_what_is_linear():
    assert torch.allclose(candidates.in_core_space(candidates.summed, UPDATES), UPDATES.sum(0))


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_subspaces_minimise_their_objective(power):
    """Five updates of rank 3 over 11 inputs cannot all be kept: the minimum is not 0."""
    updates = torch.stack([low_rank(i, 3) for i in range(5)])

    def objective(m):
        total = 0.0
        for d in updates:
            _, s, vh = torch.linalg.svd(d, full_matrices=False)
            s, vh = s[:3], vh[:3]
            total += float((((m - d) @ vh.mT) * s**power).square().sum() / (s ** (2 * power)).sum())
        return total

    best = candidates.subspaces(updates, 0.0, power)
    least = objective(best)
    assert least > 1e-3
    for seed in range(5):
        assert objective(best + 1e-3 * low_rank(seed + 50, 9)) > least


def test_null_space_takes_each_off_the_others_rows():
    one, two = UPDATES[0], UPDATES[1]
    eye = torch.eye(11, dtype=torch.float64)
    off_one, off_two = (eye - torch.linalg.pinv(u) @ u for u in (one, two))
    assert torch.allclose(candidates.null_space(UPDATES[:2]), one @ off_two + two @ off_one)
    assert torch.allclose(candidates.null_space(UPDATES[:2], 0.0), one + two)
