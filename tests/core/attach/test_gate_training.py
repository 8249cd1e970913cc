"""The gate of training as one node of the graph, against the same gate left to autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spectral_core.attach import gate_training as gate_node
from spectral_core.attach.attaching import attach
from spectral_core.attach.targets import find_targets
from spectral_core.gates import formula as gate
from spectral_core.gates.formula import GateRuntime
from spectral_core.gates.record import GateRecorder
from spectral_core.methods import FouRAConfig
from tests.core.adapter_cases import trained

RANK = 6
SHAPES = [((2, 20, RANK), False), ((3, RANK), False), ((2, 3, 4, RANK), False), ((2, RANK, 4, 5), True)]


def params() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        k: v + 0.5 * torch.randn(v.shape, generator=draw) for k, v in gate.init(RANK, "mlp", draw).items()
    }


def activations(shape: tuple[int, ...], is_convolution: bool, pairs: int) -> Tensor:
    axis = 1 if is_convolution else -1
    wide = list(shape)
    wide[axis] *= pairs
    return torch.randn(wide, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("multiply", [False, True])
@pytest.mark.parametrize("mode", ["soft", "straight_through"])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize(("shape", "is_convolution"), SHAPES, ids=str)
def test_the_node_is_the_gate(
    shape: tuple[int, ...], is_convolution: bool, pairs: int, mode: str, multiply: bool
) -> None:
    """Rows, gradients of all it depends on (the rank target's among them), and what the runtime has seen."""
    start, weight = activations(shape, is_convolution, pairs), torch.linspace(-1, 2, 6)

    def run(as_node: bool) -> list[Tensor]:
        z = start.clone().requires_grad_()
        p = {k: v.clone().requires_grad_(k in gate.trainable("mlp")) for k, v in params().items()}
        runtime = GateRuntime(mode, 0.7, target_open=0.2, penalty_weight=3.0)
        runtime.start_calibration()
        place = pairs, is_convolution, runtime, "layer"
        if as_node:
            rows, values = gate_node.Gate(p, *place).open_rows(1 * z, multiply)
            assert (values is None) == multiply
            rows = rows if values is None else rows * gate.channel_view(values, rows, is_convolution)
        else:
            rows = gate.apply(1 * z, p, "mlp", *place)
        penalty = runtime.penalty()
        assert isinstance(penalty, Tensor) and penalty > 0
        loss = (rows.flatten()[:6] * weight).sum() + rows.square().mean() + penalty
        runtime.end_step()
        seen = runtime.buffers()["layer"]
        leaves = [z, *(p[k] for k in gate.trainable("mlp"))]
        return [rows, seen["gate.mu"], seen["gate.mean_open"], *torch.autograd.grad(loss, leaves)]

    for found, expected in zip(run(True), run(False), strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 3e-6 * expected.norm() + 1e-8
    assert torch.equal(start, activations(shape, is_convolution, pairs))


def test_half_precision_is_gated_in_float32() -> None:
    z = activations((2, 20, RANK), False, 1).bfloat16().requires_grad_()
    node = gate_node.Gate(params(), 1, False, GateRuntime("soft", 1.0), "layer")
    rows, none = node.open_rows(1 * z, True)
    same, values = node.open_rows(1 * z, False)
    exact = gate.probabilities(params(), gate.features(z.detach().float(), 1, False), "mlp", 1.0)
    assert none is None and values is not None
    assert rows.dtype == same.dtype == values.dtype == torch.bfloat16
    assert torch.equal(values, exact.bfloat16()) and torch.equal(rows, z * values[:, None])
    (rows.sum() + same.sum()).backward()
    assert z.grad is not None and z.grad.dtype == torch.bfloat16 and z.grad.isfinite().all()


def test_a_stack_on_another_device_is_left_alone() -> None:
    """The layer runs where the host has moved it, and its gate's own tensors have come along."""
    place = 1, False, GateRuntime("soft", 1.0), "layer"
    here = gate_node.Gate(params(), *place)
    (stack,) = gate_node.stacked([[here]])
    assert gate_node._tensors([here._replace(stack=stack)])[1] is stack.weights
    moved = {key: value.to("meta") for key, value in params().items()}
    _, weights = gate_node._tensors([gate_node.Gate(moved, *place, stack)])
    assert all(each.is_meta for each in weights) and len(weights) == 4


def test_what_stays_with_autograd() -> None:
    z = torch.ones(1, 2, RANK)
    assert gate_node.fits(z, "mlp", "soft") and gate_node.fits(z, "mlp", "straight_through")
    assert not gate_node.fits(z, "entropy", "soft")
    assert not gate_node.fits(z, "mlp", "hard")
    assert not gate_node.fits(z.double(), "mlp", "soft")
    with torch.no_grad():
        assert not gate_node.fits(z, "mlp", "soft")
    with torch.autocast("cpu", torch.bfloat16):
        assert not gate_node.fits(z, "mlp", "soft")


class Seen(GateRecorder):
    """What a recorder is told, as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, Tensor] = {}

    def record(self, layer: str, is_open: Tensor, progress: float | Tensor | None) -> None:
        self.told[layer] = is_open.clone()


@pytest.mark.parametrize("convolution", [False, True])
def test_the_recorder_is_told_which_gates_are_open(convolution: bool) -> None:
    """As an attachment that is not trained tells it: of layers that read one input, of one alone, and of a
    convolution."""
    net = nn.Module()
    for leaf in () if convolution else ("to_q", "to_k", "to_v", "to_out"):
        net.add_module(leaf, nn.Linear(16, 16))
    if convolution:
        net.add_module("conv", nn.Conv2d(16, 16, 3, padding=1))
    weights, _ = find_targets(net, "unet", "all")
    adapter = trained(FouRAConfig(6), weights, 3)
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(2, 16, 4, 5, generator=draw) if convolution else torch.randn(2, 20, 16, generator=draw)

    def run(train: bool) -> dict[str, Tensor]:
        recorder = Seen()
        with attach(net, adapter, trainable=train) as attachment, torch.set_grad_enabled(train):
            attachment.gates.recorder = recorder
            if train:
                attachment.gates.set_mode("soft", 1.0)
            for module in net.children():
                module(x)
        return recorder.told

    found, expected = run(True), run(False)
    assert set(found) == set(expected) and len(found) == len(weights)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    both = torch.cat([each.flatten() for each in expected.values()])
    assert both.any() and not both.all(), "some are open and some are not"


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("transform", ["dct", "dft"])
def test_training_with_the_node_is_training_without_it(
    transform: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a network, with the gate on z (few tokens) and on ``up`` (more tokens than its columns)."""
    net = nn.Sequential(nn.Linear(16, 15, bias=False), nn.Linear(15, 12))
    weights, _ = find_targets(net, "unet", "all-linear")
    adapter = trained(FouRAConfig(4, transform=transform), weights, 3)
    x = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    used = []
    own = gate_node.project
    monkeypatch.setattr(gate_node, "project", lambda *a: used.append(1) or own(*a))
    monkeypatch.setattr(gate_node.Gate, "open_rows", lambda *_: pytest.fail("opened a second time"))

    def run() -> list[Tensor]:
        with attach(net, adapter, trainable=True) as attachment:
            y = net(x).square().mean()
            return [y, *torch.autograd.grad(y, [x, *attachment.parameters()])]

    ours = run()
    assert len(used) == 2
    monkeypatch.setattr(gate_node, "fits", lambda *_: False)
    for found, expected in zip(ours, run(), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-7
    assert len(used) == 2
