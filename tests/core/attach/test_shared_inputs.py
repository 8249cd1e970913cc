"""Layers that read one input, projected together, against each of them alone."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectral_core.adapter.adapter import Adapter, Term
from spectral_core.adapter.schedule import Schedule
from spectral_core.attach import gate_training as gate_node
from spectral_core.attach import shared_inputs as siblings
from spectral_core.attach.attaching import Attachment, attach
from spectral_core.attach.targets import find_targets
from spectral_core.methods import FouRAConfig, LoRAConfig, MethodConfig, SpectralAConfig
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


def products_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each product served, in order."""
    made: list[int] = []
    for module, name in ((siblings.products, "project"), (siblings.gate_node, "project")):
        own = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda x, downs, *a, f=own: made.append(len(downs)) or f(x, downs, *a)
        )
    return made


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings, "_input_of", lambda update: None)


@pytest.mark.parametrize("in_step", [False, True], ids=["no-step", "step"])
@pytest.mark.parametrize("words", [16, 12])
@pytest.mark.parametrize("case", ALL)
def test_together_is_each_alone(
    case: str, words: int, in_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, gradients of inputs and parameters, and what the gates have learned. In a step factors are
    folded and gates stacked for all layers."""
    net = tree(words)
    made = products_made(monkeypatch)

    def run(in_step: bool = False) -> list[Tensor]:
        x, read = inputs(words)
        with ExitStack() as around:
            attachment = around.enter_context(attach(net, adapter(net, case), trainable=True))
            if in_step:
                around.enter_context(attachment.folded_together())
            attachment.set_strength(0.7)
            attachment.gates.set_mode("soft", 0.8)
            attachment.gates.start_calibration()
            y = net(x, read).square().mean()
            grads = torch.autograd.grad(y, [x, *attachment.parameters()])
            attachment.gates.end_step()
            learned = attachment.gates.buffers()
            return [y, *grads, *(learned[name][key] for name in sorted(learned) for key in learned[name])]

    ours = run(in_step)
    assert made == [3, 1, 1, 2, 1], "attn1: q, k and v; out; attn2: q; k and v; out"
    alone(monkeypatch)
    theirs = run()
    assert made[5:] == [1] * 8
    for found, expected in zip(ours, theirs, strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-7


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


def test_a_schedule_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tree()
    given = adapter(net).with_schedule(Schedule.window(0.2, 0.8))

    def run() -> list[Tensor]:
        x, words = inputs()
        with attach(net, given, trainable=True) as attachment:
            attachment.set_progress(torch.tensor([0.1, 0.6]))
            y = net(x, words).square().mean()
            return [y, *torch.autograd.grad(y, [x, *attachment.parameters()])]

    ours = run()
    alone(monkeypatch)
    for found, expected in zip(ours, run(), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-7


def by_hand(net: Block, attachment: Attachment, x: Tensor, between: str) -> list[Tensor]:
    """q and k of the first attention, with something in between."""
    q = net.attn1.to_q(x)
    if between == "another":
        x = (3 * x.detach()).requires_grad_()
    if between == "twice":
        q = q + net.attn1.to_q(x)
    if between == "off":
        attachment.set_strength(0.0)
    k = net.attn1.to_k(x)
    return [q, k, *torch.autograd.grad(q.sum() + k.square().sum(), list(attachment.parameters())[:4],
                                       allow_unused=True)]  # fmt: skip


@pytest.mark.parametrize("between", ["nothing", "written", "another", "twice", "off"])
def test_only_the_same_input_unchanged_is_shared(between: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tree()

    def run() -> list[Tensor]:
        x = inputs()[0].detach().clone().requires_grad_()
        with attach(net, adapter(net, "lora"), trainable=True) as attachment:
            if between == "written":  # what a product has saved may not be written to: no gradients here
                q = net.attn1.to_q(x)
                with torch.no_grad():
                    x.mul_(2.0)
                return [q, net.attn1.to_k(x)]
            return by_hand(net, attachment, x, between)

    ours = run()
    alone(monkeypatch)
    for found, expected in zip(ours, run(), strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert torch.allclose(found, expected, atol=1e-6)


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


@pytest.mark.parametrize("how", ["removed", "step"])
def test_nothing_is_held_of_an_input_that_was_not_finished(how: str) -> None:
    net = tree()
    attachment = attach(net, adapter(net), trainable=True)
    x = (1 * inputs()[0]).requires_grad_()
    if how == "step":
        with attachment.folded_together():
            z = weakref.ref(net.attn1.to_q(x).grad_fn)
    else:
        z = weakref.ref(net.attn1.to_q(x).grad_fn)
        attachment.remove()
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None and z() is None
    attachment.remove()


def test_an_interrupted_pass_leaves_nothing_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error between q and k; the same tensor is given again."""
    net = tree()
    x, words = inputs()
    with attach(net, adapter(net), trainable=True) as attachment:
        expected = net(x, words)
        own = net.attn1.to_k.__dict__["forward"]

        def fails(_: Tensor) -> Tensor:
            raise RuntimeError("stopped")

        net.attn1.to_k.__dict__["forward"] = fails
        with pytest.raises(RuntimeError, match="stopped"):
            net(x, words)
        net.attn1.to_k.__dict__["forward"] = own
        for parameter in attachment.parameters():  # an optimiser's step in between
            with torch.no_grad():
                parameter.mul_(1.5)
        changed = net(x, words)
    with attach(net, adapter(net), trainable=True) as fresh:
        for parameter in fresh.parameters():
            with torch.no_grad():
                parameter.mul_(1.5)
        assert torch.allclose(changed, net(x, words), atol=1e-6)
    assert not torch.allclose(changed, expected, atol=1e-4)


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


@pytest.mark.parametrize("transform", ["dct", "dft"])
def test_gates_are_stacked_for_a_step_and_no_longer(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all layers of a rank; also of a layer whose siblings are off; and a step that follows without
    it has the parameters of then."""
    net = tree(12)
    given = adapter(net, "foura-dft-adaptive" if transform == "dft" else "foura-adaptive")
    off = replace(given, layer_strengths=(("unet.attn1.to_k", 0.0),))
    used: list[bool] = []
    own = gate_node._tensors

    def spied(gates: Sequence[gate_node.Gate]) -> tuple[Tensor, Sequence[Tensor]]:
        mu, weights = own(gates)
        used.append(gates[0].stack is not None and weights is gates[0].stack.weights)
        return mu, weights

    monkeypatch.setattr(gate_node, "_tensors", spied)

    def run(which: Adapter, steps: Sequence[bool]) -> list[Tensor]:
        x, words = inputs(12)
        found = []
        with attach(net, which, trainable=True) as attachment:
            for in_step in steps:
                with attachment.folded_together() if in_step else nullcontext():
                    y = net(x, words).square().mean()
                    grads = torch.autograd.grad(y, [x, *attachment.parameters()], allow_unused=True)
                found += [y, *(torch.zeros(()) if each is None else each for each in grads)]
                with torch.no_grad():
                    for parameter in attachment.parameters():
                        parameter.mul_(1.3)
        return found

    for which, stacked in ((given, [True] * 5), (off, [False, True, True, True, True])):
        used.clear()
        ours = run(which, [True, False])
        assert used == [*stacked, *[False] * 5]
        for one, other in zip(ours, run(which, [False, False]), strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


@pytest.mark.parametrize("tokens", [5, 20])  # fewer and more than a layer's columns
def test_the_rank_target_alone_has_the_gradients_of_autograd(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else needs what the gates multiply: only their p has a gradient."""
    net = tree()

    def run() -> list[Tensor | None]:
        x, words = inputs()
        with attach(net, adapter(net), trainable=True) as attachment, attachment.folded_together():
            attachment.gates.target_open, attachment.gates.penalty_weight = 0.1, 3.0
            net(x[:, :tokens], words)
            penalty = attachment.gates.penalty()
            assert isinstance(penalty, Tensor)
            return list(torch.autograd.grad(penalty, [x, *attachment.parameters()], allow_unused=True))

    ours = run()
    assert sum(each is not None and bool(each.any()) for each in ours) > 30
    monkeypatch.setattr(gate_node, "fits", lambda *_: False)
    for found, expected in zip(ours, run(), strict=True):
        one, other = (torch.zeros(1) if each is None else each for each in (found, expected))
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


@pytest.mark.parametrize("second", [False, True])
def test_rows_of_one_module_and_several_adapters(second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused q, k, v; and another adapter in training on the same layers."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"qkv": nn.Linear(16, 48)}).requires_grad_(False)
    weight = net["qkv"].weight
    layers = {f"unet.qkv[{i}:{i + 16}]": weight[i : i + 16] for i in (0, 16, 32)}
    given = [trained(FouRAConfig(4), layers, 3), trained(ALL["spectral-a"], layers, 5)][: 1 + second]
    made = products_made(monkeypatch)

    def run() -> list[Tensor]:
        x, _ = inputs()
        with ExitStack() as around:
            all_ = [around.enter_context(attach(net, each, trainable=True)) for each in given]
            y = net["qkv"](x).square().mean()
            return [y, *torch.autograd.grad(y, [x, *(p for each in all_ for p in each.parameters())])]

    ours = run()
    assert second or made == [3]
    alone(monkeypatch)
    for found, expected in zip(ours, run(), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-7


def test_who_is_whose_sibling() -> None:
    net = tree(12)
    with attach(net, adapter(net, "lora"), trainable=True) as attachment:
        groups: dict[int, set[str]] = {}
        for _, update in attachment._updates:
            if update.siblings is not None:
                groups.setdefault(id(update.siblings), set()).add(update.name.path)
    expected = [{f"attn1.to_{x}" for x in "qkv"}, {f"attn2.to_{x}" for x in "kv"}]
    assert sorted(groups.values(), key=len, reverse=True) == expected
    with attach(net, adapter(net, "lora")) as used:
        assert all(update.siblings is None for _, update in used._updates)


GATES = {"to_q": FouRAConfig(4), "to_k": FouRAConfig(6), "to_v": LoRAConfig(3), "to_out": FouRAConfig(4)}
TIES = {"to_q": SpectralAConfig((0, 1, 2)), "to_k": SpectralAConfig((3, 4)), "to_v": LoRAConfig(4)}


@pytest.mark.parametrize(("configs", "expected"), [(GATES, [1] * 8), (TIES, [3, 1, 2])])
def test_siblings_of_different_ranks_and_methods(
    configs: dict[str, MethodConfig], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are alike share a product, and x is projected for all of them."""
    net = tree()
    weights = find_targets(net, "unet", "all-linear")[0]
    layers = {
        name: layer
        for leaf, config in configs.items()
        for name, layer in trained(config, {n: w for n, w in weights.items() if leaf in n}, 3).layers.items()
    }
    made = products_made(monkeypatch)

    def run() -> list[Tensor]:
        x, words = inputs()
        with attach(net, Adapter(layers), trainable=True) as attachment:
            y = net(x, words).square().mean()
            return [y, *torch.autograd.grad(y, [x, *attachment.parameters()])]

    ours = run()
    assert made == expected
    alone(monkeypatch)
    for found, wanted in zip(ours, run(), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm() + 1e-7


def test_levels_are_learned_once_a_step_and_no_more_when_they_are_settled() -> None:
    net = tree()
    with attach(net, adapter(net), trainable=True) as attachment:
        gates = attachment.gates
        gates.settle_steps = 2
        learned = []
        for step in range(4):
            x, words = inputs()
            net((1 + step) * x, words)
            assert gates.watches("unet.attn1.to_k") == (step < 2)
            gates.end_step()
            learned.append(gates.buffers()["unet.attn1.to_k"]["gate.mu"])
    assert (
        learned[0] < learned[1]
        and torch.equal(learned[1], learned[2])
        and torch.equal(learned[1], learned[3])
    )
