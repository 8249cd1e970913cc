"""Training through a network of attentions: what is computed, kept, and learned on the way."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectral_core.adapter.adapter import Adapter, Term
from spectral_core.attach.attaching import attach
from spectral_core.attach.targets import find_targets
from spectral_core.gates.record import GateRecorder
from spectral_core.methods import FouRAConfig
from tests.core.adapter_cases import ALL, trained


class Attention(nn.Module):
    """q, k and v as diffusers and the host name them; ``words``: what k and v read in cross-attention."""

    def __init__(self, width: int = 16, words: int | None = None) -> None:
        super().__init__()
        read = words or width
        self.to_q, self.to_out = nn.Linear(width, 16, bias=False), nn.Linear(16, width)
        self.to_k, self.to_v = nn.Linear(read, 16, bias=False), nn.Linear(read, 16, bias=False)

    def forward(self, x: Tensor, words: Tensor | None = None) -> Tensor:
        read = x if words is None else words
        y = nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(read), self.to_v(read))
        return x + self.to_out(y)


class Block(nn.Module):
    def __init__(self, words: int = 16) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention(words=words)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return self.attn2(self.attn1(x), words)


def tree(words: int = 16) -> Block:
    torch.manual_seed(0)
    return Block(words).requires_grad_(False)


def adapter(net: nn.Module, case: str = "foura-adaptive") -> Adapter:
    """The level μ of every gate is another one."""
    levels = itertools.count(-3.0, 0.7)

    def moved(name: str, term: Term) -> Term:
        level = {"gate.mu": torch.tensor(next(levels))} if "gate.mu" in term.params else {}
        return replace(term, params=dict(term.params) | level)

    return trained(ALL[case], find_targets(net, "unet", "all-linear")[0], 3).map_terms(moved)


def inputs(words: int = 16) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(2, 20, 16, generator=draw).requires_grad_(), torch.randn(2, 7, words, generator=draw)


@pytest.mark.parametrize("case", ["foura-adaptive", "lora"])
def test_a_gradient_is_made_only_of_what_needs_one(case: str) -> None:
    """The words need none: the layers that read them must not make one."""
    net = tree()
    seen: list[bool] = []
    own = nn.Linear.forward
    x, words = inputs()
    with attach(net, adapter(net, case), trainable=True):
        for module in (net.attn2.to_k, net.attn1.to_k):
            dispatcher = module.__dict__["forward"]
            dispatcher.base = lambda given, m=module: seen.append(given.requires_grad) or own(m, given)
        net(x, words)
    assert seen == [True, False]


@pytest.mark.parametrize("case", ["foura-adaptive", "lora", "spectral-a"])
def test_a_layer_that_did_not_run_has_no_gradients_and_its_gates_were_not_seen(case: str) -> None:
    net = tree()
    x, _ = inputs()
    with attach(net, adapter(net, case), trainable=True) as attachment:
        attachment.gates.start_calibration()
        net.attn1.to_q(x).sum().backward()
        attachment.gates.end_step()
        assert set(attachment.gates.buffers()) == ({"unet.attn1.to_q"} if "adaptive" in case else set())
        have = {name for name, p in attachment.named_parameters() if p.grad is not None}
    assert have and all(name.startswith("unet.attn1.to_q") for name in have)


def test_checkpointing_computes_the_same_again() -> None:
    net = tree()

    def run(checkpointed: bool) -> list[Tensor]:
        x, words = inputs()
        with attach(net, adapter(net), trainable=True) as attachment, attachment.folded_together():
            y = checkpoint(net, x, words, use_reentrant=False) if checkpointed else net(x, words)
            loss = y.square().mean()
            return [loss, *torch.autograd.grad(loss, [x, *attachment.parameters()])]

    for found, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(found, expected)


def test_levels_are_learned_once_a_step_and_no_more_when_they_are_settled() -> None:
    net = tree()
    with attach(net, adapter(net), trainable=True) as attachment:
        gates = attachment.gates
        gates.settle_steps = 2
        learned = []
        for step in range(4):
            x, words = inputs()
            net((1 + step) * x, words)
            gates.end_step()
            learned.append(gates.buffers()["unet.attn1.to_k"]["gate.mu"])
    assert (
        learned[0] < learned[1]
        and torch.equal(learned[1], learned[2])
        and torch.equal(learned[1], learned[3])
    )


class Seen(GateRecorder):
    """What a recorder is told, as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, Tensor] = {}

    def record(self, layer: str, is_open: Tensor, progress: float | Tensor | None) -> None:
        self.told[layer] = is_open.clone()


def test_the_recorder_is_told_in_training_what_it_is_told_in_use() -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(2), nn.Linear(20, 16))
    weights, _ = find_targets(net, "unet", "all")
    given = trained(FouRAConfig(6), weights, 3)
    x = torch.randn(2, 16, 4, 5, generator=torch.Generator().manual_seed(2))

    def run(train: bool) -> dict[str, Tensor]:
        recorder = Seen()
        with attach(net, given, trainable=train) as attachment, torch.set_grad_enabled(train):
            attachment.gates.recorder = recorder
            attachment.gates.set_mode("straight_through" if train else "hard", 1.0)
            net(x)
        return recorder.told

    found, expected = run(True), run(False)
    assert set(found) == set(expected) == set(weights)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    both = torch.cat([each.flatten() for each in expected.values()])
    assert both.any() and not both.all(), "some are open and some are not"
