"""Two small tasks that a fixed low-rank update cannot solve and a gate can: are masks learned?

Two clusters of token batches share one input space but want different updates of rank 4. ``profile``: the
clusters differ in which half of the input directions carries the energy. ``scale``: they differ in overall
size alone, 7×, which a LayerNorm removes. The rank is 32, far above the 8 that are needed, so that closing
rows costs nothing.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_core.gates import formula as gate
from spectral_core.maths.layers import Geometry, LayerShape, expand, project
from spectral_core.methods import foura
from tests.core.gates.gated import apply

N, RANK, NEEDED, TOKENS, ROWS = 24, 32, 4, 12, 16
SHAPE = LayerShape(N, N)


class Toy:
    """Batches x (2·ROWS, TOKENS, N) of both clusters and what the adapter should add to their outputs."""

    def __init__(self, coding: str, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.updates = [
            torch.randn(N, NEEDED, generator=self.draw) @ torch.randn(NEEDED, N, generator=self.draw) / N
            for _ in range(2)
        ]
        quiet = torch.full((N // 2,), 0.3)
        loud = torch.full((N // 2,), 1.4)
        if coding == "profile":
            self.profiles = [torch.cat([loud, quiet]), torch.cat([quiet, loud])]
        else:
            self.profiles = [torch.full((N,), 0.37), torch.full((N,), 2.7)]

    def batch(self) -> tuple[Tensor, Tensor]:
        xs = [torch.randn(ROWS, TOKENS, N, generator=self.draw) * p for p in self.profiles]
        ys = [x @ w.mT for x, w in zip(xs, self.updates, strict=True)]
        return torch.cat(xs), torch.cat(ys)


def error(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the two clusters of the squared error relative to each cluster's own energy."""
    pairs = zip(output.chunk(2), wanted.chunk(2), strict=True)
    return sum(((o - w).square().mean() / w.square().mean() for o, w in pairs), torch.zeros(())) / 2


def train(
    toy: Toy, gated: bool, seed: int, blind: bool = False, kind: str = "mlp", steps: int = 200
) -> tuple[float, Tensor]:
    """(held-out error with hard gates, masks (2·ROWS, RANK)) after training as the trainer does it."""
    config = foura.FouRAConfig(RANK, gate="adaptive" if gated else "none", gate_kind=kind)
    params = foura.init(config, SHAPE, None, torch.Generator().manual_seed(seed))
    learned = [params[name].requires_grad_() for name in foura.trainable(config)]
    if blind:  # the ablation: the column of W₁ that sees the level stays zero
        params["gate.w1"].data[:, -1] = 0
        params["gate.w1"].register_hook(lambda g: torch.cat([g[:, :-1], torch.zeros_like(g[:, -1:])], 1))
    optimiser = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.0)
    runtime = gate.GateRuntime()

    def forward(x: Tensor) -> Tensor:
        factors = foura.fold(config, SHAPE, params)
        z = project(x, factors.down, Geometry())
        if gated:
            z = apply(z, params, config.gate_kind, config.rows_per_gate, False, runtime, "layer")
        return expand(z, factors.scaled_up(), False)

    for step in range(steps):
        runtime.anneal(step / steps)
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * min(1.0, 3 * (1 - step / steps))
        x, wanted = toy.batch()
        loss = error(forward(x), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        runtime.end_step()
    params |= runtime.buffers().get("layer", {})
    with torch.no_grad(), runtime.inference():
        x, wanted = toy.batch()
        held_out = float(error(forward(x), wanted))
        z = project(x, foura.fold(config, SHAPE, params).down, Geometry())
        masks = (
            gate.logits(params, gate.features(z, 1, False), kind) > 0 if gated else torch.ones(2 * ROWS, RANK)
        )
    return held_out, masks


def difference(masks: Tensor) -> float:
    """How many gates the two clusters' mean masks differ in."""
    one, other = masks.float().chunk(2)
    return float((one.mean(0) - other.mean(0)).abs().sum())


def constancy(masks: Tensor) -> float:
    """Share of gates on which every row of a cluster agrees."""
    return float(torch.cat([(m == m[:1]).all(0) for m in masks.chunk(2)]).float().mean())


@pytest.mark.parametrize(("kind", "seed"), [("mlp", 0), ("mlp", 1), ("mlp", 2), ("entropy", 0)])
@pytest.mark.parametrize("coding", ["profile", "scale"])
def test_learns_masks_from_the_input(coding: str, kind: str, seed: int) -> None:
    plain, _ = train(Toy(coding, seed), gated=False, seed=seed)
    gated, masks = train(Toy(coding, seed), gated=True, seed=seed, kind=kind)
    assert gated < 0.1 * plain
    assert difference(masks) >= NEEDED
    assert constancy(masks) >= 0.75
    assert masks.any(1).all(), "no row of the batch may lose the whole adapter"


def test_without_the_level_it_is_blind_to_scale() -> None:
    """LayerNorm alone removes what the clusters differ in; half of the targets' energy is out of reach."""
    for seed in (0, 1):
        sighted, _ = train(Toy("scale", seed), gated=True, seed=seed)
        blind, masks = train(Toy("scale", seed), gated=True, seed=seed, blind=True)
        assert blind > 0.4
        assert sighted < 0.1 * blind
        assert difference(masks) < NEEDED


def test_without_the_level_it_still_sees_profiles() -> None:
    """The ablation above removes the level and nothing else."""
    blind, masks = train(Toy("profile", 0), gated=True, seed=0, blind=True)
    assert blind < 0.01
    assert difference(masks) >= NEEDED
