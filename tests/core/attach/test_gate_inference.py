"""Gates with their constants worked out say what the formula says, for several layers at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_core.attach.gate_inference import FoldedGates
from spectral_core.gates import formula as gate


def gates(count: int, rank: int, seed: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    shapes = gate.tensor_shapes(rank, "mlp")
    return [{k: torch.randn(s, generator=draw) for k, s in shapes.items()} for _ in range(count)]


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize(("rank", "batch", "tokens"), [(1, 1, 5), (4, 2, 1), (8, 3, 40), (64, 1, 9)])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 300.0])
def test_open_rows_are_those_of_the_formula(
    count: int, rank: int, batch: int, tokens: int, scale: float
) -> None:
    draw = torch.Generator().manual_seed(rank + count)
    each = gates(count, rank)
    z = scale * torch.randn(batch, tokens, count * rank, generator=draw)
    z *= torch.rand(batch, 1, count * rank, generator=draw)  # rows differ, so do gates
    found = FoldedGates.of(each).open(z)
    assert found.shape == (count, batch, rank) and found.dtype == torch.bool
    undecided = 0
    for i, params in enumerate(each):
        own = z[..., i * rank : (i + 1) * rank]
        logits = gate.logits(params, gate.features(own, 1, False), "mlp")
        decided = logits.abs() > 1e-4 * (1 + scale)
        assert torch.equal(found[i][decided], logits[decided] > 0)
        undecided += int((~decided).sum())
    assert undecided <= 0.05 * found.numel()


def test_half_precision_decides_in_float32() -> None:
    each = gates(2, 8)
    z = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(1)).half()
    assert torch.equal(FoldedGates.of(each).open(z), FoldedGates.of(each).open(z.float()))


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    folded = FoldedGates.of(gates(2, 8))
    z = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(2))
    z *= torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    both = folded.open(z)
    assert not torch.equal(both[:, 0], both[:, 2])
    for row in range(3):
        assert torch.equal(folded.open(z[row : row + 1])[:, 0], both[:, row])
