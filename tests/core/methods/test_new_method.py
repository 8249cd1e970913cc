"""A new method is one file and one row: this is such a file, and everything takes it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Generator, Tensor, nn

from spectral_core.adapter.adapter import create
from spectral_core.analysis.spectra import summary_text
from spectral_core.attach.attaching import attach
from spectral_core.attach.targets import find_targets
from spectral_core.files.adapter_file import load, save
from spectral_core.files.lora_export import export_lora
from spectral_core.files.lora_import import import_lora
from spectral_core.fusion import fuse
from spectral_core.maths.layers import LayerShape
from spectral_core.maths.lowrank import Factors
from spectral_core.methods import METHODS, _method, common
from spectral_core.training.config.config import TrainConfig


@dataclass(frozen=True)
class SymmetricConfig(common.MethodConfig):
    """ΔW = (strength · d) v vᵀ, square layers."""

    method: ClassVar[str] = "symmetric"
    title: ClassVar[str] = "Symmetric"
    rank: int


def tensor_shapes(config: SymmetricConfig, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    return {"v": (config.rank, shape.in_features), "d": (config.rank,)}


def trainable(config: SymmetricConfig) -> tuple[str, ...]:
    return ("v", "d")


def init(
    config: SymmetricConfig, shape: LayerShape, basis: object, generator: Generator | None
) -> dict[str, Tensor]:
    return {
        "v": common.kaiming_down(config.rank, shape, generator),
        "d": torch.zeros(config.rank),
    }


def fold(
    config: SymmetricConfig, shape: LayerShape, params: Mapping[str, Tensor], strength: float = 1.0
) -> Factors:
    return Factors(params["v"], params["v"].mT * params["d"], strength)


def test_everything_takes_a_new_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = _method(sys.modules[__name__], SymmetricConfig, needs_basis=False)
    monkeypatch.setitem(METHODS, "symmetric", row)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).requires_grad_(False)
    x = torch.randn(2, 5, 6)
    base = net(x)
    adapter = create(find_targets(net, "unet", "all-linear")[0], SymmetricConfig(2))
    with attach(net, adapter, trainable=True) as attachment:
        optimiser = torch.optim.SGD(attachment.parameters(), 0.5)
        for _ in range(3):
            loss = (net(x) - base - x).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            optimiser.zero_grad()
        trained, expected = attachment.to_adapter(), net(x).detach()
    assert (expected - base).norm() > 1e-3 * base.norm()

    again = load(save(trained, tmp_path / "new.safetensors"))
    exported = import_lora(
        export_lora(trained, tmp_path / "lora.safetensors", "diffusers", torch.float32).path
    )
    for found in (again, exported, fuse([trained], "sum").adapter):
        with attach(net, found):
            assert torch.allclose(net(x), expected, atol=1e-5)
    assert torch.equal(net(x), base)
    assert "symmetric, rank 2" in summary_text(trained)
    assert TrainConfig().rate_for("symmetric") == common.MethodConfig.learning_rate
