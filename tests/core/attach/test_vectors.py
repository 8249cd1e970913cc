"""Biases and norms: read from a LoRA file, live as merged, scheduled, fused, saved and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectral_core.adapter.adapter import Adapter
from spectral_core.adapter.schedule import Schedule
from spectral_core.attach.attaching import attach
from spectral_core.attach.merging import merge_into
from spectral_core.errors import SpectralAdapterError
from spectral_core.files.adapter_file import load, save
from spectral_core.files.lora_export import export_lora
from spectral_core.files.lora_import import read_lora
from spectral_core.fusion import fuse


class RMSNorm(nn.Module):
    """As libraries write it: no bias, no ``normalized_shape``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.group = nn.GroupNorm(4, 8)
        self.layer = nn.LayerNorm(8)
        self.rms = RMSNorm(8)
        self.out = nn.Linear(8, 5)
        for module in (self.group, self.layer):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.conv(x)).flatten(2).mT
        return self.out(self.rms(self.layer(x)))


DIFFERENCES = {
    "unet.conv.diff_b": 8,
    "unet.group.w_norm": 8,
    "unet.group.b_norm": 8,
    "unet.layer.diff": 8,
    "unet.layer.diff_b": 8,
    "unet.rms.w_norm": 8,
    "unet.out.diff_b": 5,
}
PARAMETER = {"diff_b": "bias", "b_norm": "bias", "w_norm": "weight", "diff": "weight"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    tensors = {key: torch.randn(size) for key, size in DIFFERENCES.items()}
    tensors |= {"unet.out.lora_A.weight": torch.randn(2, 8), "unet.out.lora_B.weight": torch.randn(5, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def changed(model: Net, file: Path, strength: float) -> Net:
    """The model with the file's differences added by hand."""
    found = load_file(file)
    with torch.no_grad():
        for key in DIFFERENCES:
            path, _, kind = key.removeprefix("unet.").rpartition(".")
            getattr(getattr(model, path), PARAMETER[kind]).add_(strength * found[key])
        down, up = found["unet.out.lora_A.weight"], found["unet.out.lora_B.weight"]
        model.out.weight.add_(strength * up @ down)
    return model


def made() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize("strength", [1.0, -0.7, 0.0])
def test_live_and_merged_are_the_differences_added(file: Path, strength: float) -> None:
    adapter = read_lora(file).adapter.scaled(strength)
    model, x = made()
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = changed(made()[0], file, strength)(x)
    with attach(model, adapter) as attachment:
        assert not attachment.report.problems
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    with merge_into(model, adapter):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_follows_a_schedule_by_rows_of_the_batch(file: Path) -> None:
    adapter = read_lora(file).adapter.with_schedule(Schedule(((0.0, 0.0), (1.0, 1.0))))
    model, x = made()
    with attach(model, adapter) as attachment:
        attachment.set_progress(torch.tensor([0.25, 1.0]))
        found = model(x)
    for row, strength in enumerate((0.25, 1.0)):
        expected = changed(made()[0], file, strength)(x)[row]
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)


def test_saved_fused_and_exported_they_are_the_same(file: Path, tmp_path: Path) -> None:
    adapter = read_lora(file).adapter
    save(adapter, tmp_path / "a.safetensors")
    fused = fuse([load(tmp_path / "a.safetensors"), adapter], weights=[0.5, 0.5]).adapter
    report = export_lora(fused, tmp_path / "b.safetensors", dtype=torch.float32)
    assert not report.omitted
    written = load_file(tmp_path / "b.safetensors")
    assert {"lora_unet_group.diff", "lora_unet_group.diff_b"} <= set(written)
    model, x = made()
    expected = changed(made()[0], file, 1.0)(x)
    for path in ("a", "b"):
        again = load(tmp_path / "a.safetensors") if path == "a" else _unet_names(tmp_path / "b.safetensors")
        with attach(model, again):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def _unet_names(path: Path) -> Adapter:
    """The names of a model that only this test knows, back from kohya's."""
    found = read_lora(path).adapter
    layers = {name.replace("kohya.lora_unet_", "unet."): layer for name, layer in found.layers.items()}
    return Adapter(layers)


def test_what_changes_nothing_is_said_and_twice_is_refused(tmp_path: Path) -> None:
    lora = {"unet.out.lora_A.weight": torch.randn(2, 8), "unet.out.lora_B.weight": torch.randn(5, 2)}
    save_file({**lora, "unet.out.diff_b": torch.zeros(5)}, tmp_path / "zero.safetensors")
    read = read_lora(tmp_path / "zero.safetensors")
    assert list(read.adapter.layers) == ["unet.out"] and "change nothing" in read.notes[-1]
    both = {"unet.layer.diff_b": torch.ones(8), "unet.layer.b_norm": torch.ones(8)}
    save_file({**lora, **both}, tmp_path / "twice.safetensors")
    with pytest.raises(SpectralAdapterError, match="twice"):
        read_lora(tmp_path / "twice.safetensors")
    save_file({**lora, "unet.out.diff_b": torch.full((5,), torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(SpectralAdapterError, match="finite"):
        read_lora(tmp_path / "nan.safetensors")


def test_a_vector_without_a_place_is_named(file: Path) -> None:
    model, _ = made()
    model.out.bias = None
    with pytest.raises(SpectralAdapterError, match=r"unet\.out\.bias.*has no bias"):
        attach(model, read_lora(file).adapter)
    assert "forward" not in model.out.__dict__
