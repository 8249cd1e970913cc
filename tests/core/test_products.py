"""The update's products in training against the same update left to autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spectral_core import live
from spectral_core.attach import attach
from spectral_core.targets import find_targets
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
