"""The update's products in training against the same update left to autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spectral_core.attach import products
from spectral_core.attach import update as live
from spectral_core.attach.attaching import attach
from spectral_core.attach.targets import find_targets
from tests.core.adapter_cases import ALL, trained


@pytest.mark.parametrize(("tokens", "bias"), [(20, False), (20, True), (5, False)])
@pytest.mark.parametrize("case", ALL)
def test_the_products_of_training_are_those_of_autograd(
    case: str, tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients, the input being used elsewhere too; of LoRA the second derivatives as well."""
    net = nn.Sequential(nn.Linear(16, 15, bias=bias), nn.Linear(15, 12, bias=bias))
    weights, _ = find_targets(net, "unet", "all-linear")
    adapter = trained(ALL[case], weights, 3)
    x = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def run() -> list[Tensor]:
        with attach(net, adapter, trainable=True) as attachment:
            attachment.set_strength(0.7)
            y = net(x).square().mean() + net[0](2 * x).square().mean() + x.square().sum()
            leaves = [x, *attachment.parameters()]
            grads = torch.autograd.grad(y, leaves, create_graph=case == "lora")
            if case != "lora":
                return [y, *grads]
            return [y, *grads, *torch.autograd.grad(grads[0].square().sum(), leaves)]

    ours = run()
    monkeypatch.setattr(live.LayerUpdate, "begin", lambda self, x: (x, None))
    for found, expected in zip(ours, run(), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-7


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("on_up", [False, True])
def test_first_and_second_derivatives_of_the_gated_product(on_up: bool) -> None:
    given = doubles((2, 3, 4), (2, 3, 2), (4, 2), (2, 2))

    def run(*t: Tensor) -> Tensor:
        return products.add_gated(*t, 0.7, on_up, False)

    assert torch.allclose(run(*given), given[0] + 0.7 * (given[1] * given[3][:, None]) @ given[2].mT)
    assert torch.autograd.gradcheck(run, given) and torch.autograd.gradgradcheck(run, given)


def test_first_and_second_derivatives_of_the_projection() -> None:
    given = doubles((2, 3, 5), (4, 5))

    def run(x: Tensor, down: Tensor) -> Tensor:
        x, z = products.project(1 * x, down)
        return torch.cat([x.sin(), z], -1)

    assert torch.autograd.gradcheck(run, given) and torch.autograd.gradgradcheck(run, given)
