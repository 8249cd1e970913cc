"""Gradients in every mode are those of the same model written without in-place operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_core.training.engine import checkpointing

WIDTH, BLOCKS = 8, 4


class InPlace(nn.Module):
    """Writes into its input after layers kept it: sums, products, slices, and an output that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, pair: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        text = pair[0]
        x += self.a(self.norm(x))
        y = torch.sigmoid(self.b(x))
        x.addcmul_(y, text)
        y *= 0.5
        x[:, :2] += self.b(x[:, 2:4] * y[:, :2])
        text *= 1.1
        options["block"] = options.get("block", 0) + 1
        return x, text


class OutOfPlace(InPlace):
    def forward(self, x: Tensor, pair: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        text = pair[0]
        x = x + self.a(self.norm(x))
        y = torch.sigmoid(self.b(x))
        x = x + y * text
        y = y * 0.5
        x = torch.cat([x[:, :2] + self.b(x[:, 2:4] * y[:, :2]), x[:, 2:]], 1)
        return x, text * 1.1


class Model(nn.Module):
    def __init__(self, kind: type[InPlace]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(BLOCKS))
        self.in_place = kind is InPlace

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x, options = self.first(x), dict[str, Any]()
        kept = x.tanh() * x
        if self.in_place:  # at the top of the model, outside of every block
            x *= 2
            x = x.clone()
        else:
            x = x * 2
        for block in self.blocks:
            x, text = block(x, [text], options)
        out: Tensor = self.last(x) + kept
        return out


def gradients(kind: type[InPlace], mode: str, steps: int = 1) -> list[list[Tensor]]:
    torch.manual_seed(0)
    model, found = Model(kind), []
    x, text = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    with checkpointing.checkpointed([model], mode):
        for _ in range(steps):
            model.zero_grad()
            model(x.clone(), text.clone()).square().mean().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert not any("forward" in vars(m) for m in model.modules())
    return found


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_gradients_are_those_without_writing_in_place(mode: str) -> None:
    """In the first step, where nothing is known of the model, and later."""
    torch.manual_seed(0)
    (expected,) = gradients(OutOfPlace, "none")
    for step in gradients(InPlace, mode, steps=3):
        assert len(step) == len(expected) > 4 * BLOCKS
        assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(step, expected, strict=True))


def test_the_model_cannot_be_trained_as_it_is() -> None:
    """What all of this is for: torch refuses, and its own checkpointing is wrong."""
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="inplace"):
        Model(InPlace)(torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)).sum().backward()


def test_a_model_that_writes_nothing_in_place_runs_as_it_is() -> None:
    """From the second step on nothing is kept twice and no hook is left."""
    kept: list[int] = []
    model = Model(OutOfPlace)
    with checkpointing.checkpointed([model], "none"):
        for _ in range(2):
            kept.clear()
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(1) or t, lambda t: t)  # type: ignore[func-returns-value]
            with hooks:
                model(torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)).sum().backward()
    assert len(kept) > 5 * BLOCKS, "the hooks around the model see its tensors"


@pytest.mark.parametrize("autocast", [False, True])
def test_what_runs_again_runs_in_the_same_precision_with_the_same_random_numbers(autocast: bool) -> None:
    tree = nn.Module()
    tree.blocks = nn.ModuleList([_Dropping(), _Dropping()])

    def run(mode: str) -> list[Tensor]:
        torch.manual_seed(3)
        tree.zero_grad()
        with checkpointing.checkpointed([tree], mode):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                x = torch.ones(3, 4)
                for block in tree.blocks:  # type: ignore[union-attr]
                    x = block(x)
            x.float().square().sum().backward()
        return [p.grad.clone() for p in tree.parameters() if p.grad is not None]

    expected, found = run("none"), run("full")
    assert len(found) == 8 and all(map(torch.equal, found, expected))


class _Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.drop(self.a(x)))
        return out
