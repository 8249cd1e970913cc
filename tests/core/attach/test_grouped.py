"""Updates of grouped and transposed convolutions, from LoRA files: live is merged is what hosts add."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from spectral_core.adapter.adapter import Adapter
from spectral_core.adapter.schedule import Schedule
from spectral_core.attach.attaching import attach
from spectral_core.attach.merging import merge_into
from spectral_core.attach.targets import find_targets
from spectral_core.errors import SpectralAdapterError
from spectral_core.files.lora_import import import_lora
from spectral_core.methods import FouRAConfig
from spectral_core.statistics.collect import modules_of
from tests.core.adapter_cases import trained

LAYERS = {
    "grouped 1d": (nn.Conv1d(6, 9, 3, stride=2, padding=1, groups=3), (2, 6, 11)),
    "grouped 2d": (nn.Conv2d(6, 4, (3, 1), padding=(1, 0), groups=2), (2, 6, 7, 5)),
    "reflected": (nn.Conv2d(6, 4, 3, padding=1, groups=2, padding_mode="reflect"), (2, 6, 7, 5)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 7, 5)),
    "grouped 3d": (nn.Conv3d(4, 4, 2, groups=2), (1, 4, 3, 4, 5)),
    "transposed 1d": (nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1), (2, 6, 9)),
    "transposed 2d": (nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1), (2, 6, 5, 4)),
    "transposed 3d": (nn.ConvTranspose3d(2, 5, 2, dilation=2), (1, 2, 3, 3, 3)),
    "transposed, grouped": (nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), (2, 6, 5, 4)),
}


def written(tmp_path: Path, name: str, weight: Tensor) -> tuple[Adapter, Tensor]:
    """A file's update of a weight, and what hosts add: up · down in the weight's own layout."""
    generator = Generator().manual_seed(0)
    down = torch.randn(2, *weight.shape[1:], generator=generator)
    up = torch.randn(len(weight), 2, *(1,) * (weight.dim() - 2), generator=generator)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "a.safetensors")
    return import_lora(tmp_path / "a.safetensors"), (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


@pytest.mark.parametrize("case", LAYERS)
def test_live_is_merged_is_the_hosts(tmp_path: Path, case: str) -> None:
    module, size = LAYERS[case]
    tree = nn.ModuleDict({"blocks": nn.ModuleDict({"conv": module})})
    adapter, difference = written(tmp_path, "net.blocks.conv", module.weight.detach())
    x = torch.randn(size, generator=Generator().manual_seed(1))
    with torch.no_grad():
        base, kept = module(x), module.weight.clone()
        module.weight.add_(0.7 * difference)
        expected = module(x)
        module.weight.copy_(kept)
        with merge_into(tree, adapter.scaled(0.7)):
            assert torch.allclose(module.weight, kept + 0.7 * difference, atol=1e-6)
        assert torch.equal(module.weight, kept)
        if case == "transposed, grouped":
            with pytest.raises(SpectralAdapterError, match="groups=2; merge"):
                attach(tree, adapter)
            return
        with attach(tree, adapter.scaled(0.7)):
            live = module(x)
        half = adapter.with_schedule(Schedule(((0.0, 0.0), (1.0, 1.0))))
        with attach(tree, half) as on:
            on.set_progress(torch.linspace(0.0, 0.7, len(x)) if len(x) > 1 else 0.7)
            last = module(x)[-1]
    size_ = (expected - base).norm()
    assert size_ > 0.1 and (live - expected).norm() <= 1e-6 * size_ * 10
    assert (last - expected[-1]).norm() <= 1e-5 * size_
    assert torch.equal(module(x), base)


def test_only_plain_ones_are_trained_and_watched(tmp_path: Path) -> None:
    tree = nn.ModuleDict({"grouped": LAYERS["grouped 2d"][0], "plain": nn.Conv2d(6, 4, 3)})
    weights, report = find_targets(tree, "net", "all")
    assert list(weights) == ["net.plain"] and "groups=2" in report.refused["net.grouped"]
    adapter, _ = written(tmp_path, "net.grouped", tree["grouped"].weight.detach())
    assert modules_of(tree, [adapter], "net") == {}
    gated = trained(FouRAConfig(2, gate="adaptive"), {"net.grouped": tree["grouped"].weight.detach()})
    with pytest.raises(SpectralAdapterError, match="gate adapts to the input"):
        attach(tree, gated)


def test_an_update_that_fits_by_its_number_of_values_only_is_refused(tmp_path: Path) -> None:
    """One made for (out, in) of a transposed convolution: hosts reshape it, which means nothing."""
    module = LAYERS["transposed 2d"][0]
    tree = nn.ModuleDict({"conv": module})
    adapter, _ = written(tmp_path, "net.conv", module.weight.detach().transpose(0, 1))
    with pytest.raises(SpectralAdapterError, match=r"found a layer of shape 6×4×3×3, expected 4×6×3×3"):
        attach(tree, adapter)
