"""One adapter at a smaller rank: the nearest update of that rank, and what it carries on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from spectral_core.adapter.adapter import Adapter
from spectral_core.cli.main import main
from spectral_core.errors import SpectralAdapterError
from spectral_core.files.adapter_file import load, save
from spectral_core.files.container import open_safely
from spectral_core.files.lora_export import export_lora
from spectral_core.files.lora_import import import_lora
from spectral_core.fusion import fuse, recompress

NAME = "lora_unet_double_blocks_0_img_attn_qkv"
METADATA = {"ss_base_model_version": "flux1", "modelspec.architecture": "flux-1-dev/lora"}


def lokr(folder: Path, name: str = "a") -> Path:
    """Of full rank, with singular values that fall."""
    scales = 0.5 ** torch.arange(8.0)
    first = torch.linalg.qr(torch.randn(8, 8))[0] * scales @ torch.linalg.qr(torch.randn(8, 8))[0]
    parts = {f"{NAME}.lokr_w1": first, f"{NAME}.lokr_w2": torch.randn(6, 5)}
    safetensors.torch.save_file(parts, folder / f"{name}.safetensors", metadata=METADATA)
    return folder / f"{name}.safetensors"


def update(adapter: Adapter) -> torch.Tensor:
    (layer,) = adapter.layers.values()
    factors = layer.factors()
    return factors.scaled_up() @ factors.down


def test_a_rank_keeps_the_largest_directions(tmp_path: Path) -> None:
    whole = import_lora(lokr(tmp_path))
    small = recompress(whole, rank=7)
    u, s, vh = torch.linalg.svd(update(whole))
    best = u[:, :7] * s[:7] @ vh[:7]
    assert (update(small.adapter) - best).norm() <= 1e-5 * best.norm()
    (row,) = small.report.layers
    assert (row.rank_before, row.rank_after) == (40, 7)
    assert row.error == pytest.approx(float(s[7:].norm() / s.norm()), rel=1e-3)


@pytest.mark.parametrize("error", [0.3, 0.05])
def test_an_error_takes_the_smallest_rank_within_it(tmp_path: Path, error: float) -> None:
    whole = import_lora(lokr(tmp_path))
    (row,) = recompress(whole, error=error).report.layers
    s = torch.linalg.svdvals(update(whole))
    assert row.error <= error < float(s[row.rank_after - 1 :].norm() / s.norm())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small.safetensors"
    assert main(["resize", str(lokr(tmp_path)), "-o", str(out), "--rank", "3", "--layers"]) == 0
    assert "rank 40 -> 3" in capsys.readouterr().out
    assert update(load(out)).shape == (48, 40) and torch.linalg.matrix_rank(update(load(out))) == 3
    assert main(["resize", str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "b.safetensors")]) == 1


def test_nothing_to_do_is_said() -> None:
    with pytest.raises(SpectralAdapterError, match="give a rank, an error"):
        recompress(Adapter({}))


def test_the_base_model_is_carried_on(tmp_path: Path) -> None:
    """Through resizing, fusing, saving and exporting; two bases that differ become none."""
    whole = import_lora(lokr(tmp_path))
    for adapter in (
        recompress(whole, rank=3).adapter,
        fuse([whole, import_lora(lokr(tmp_path, "b"))]).adapter,
    ):
        save(adapter, tmp_path / "s.safetensors", overwrite=True)
        export_lora(load(tmp_path / "s.safetensors"), tmp_path / "e.safetensors", overwrite=True)
        found = open_safely(tmp_path / "e.safetensors").metadata
        assert {word: found[word] for word in METADATA} == METADATA
    other = whole.with_provenance(training={"base_version": "sdxl_base_v1-0"})
    assert "base_version" not in fuse([whole, other]).adapter.provenance.training


def test_trained_words_stand_where_programs_look(tmp_path: Path) -> None:
    adapter = import_lora(lokr(tmp_path)).with_provenance(
        name="both", trigger_words=("<tom>", "ein Bär"), training={"images": 12}
    )
    export_lora(adapter, tmp_path / "e.safetensors")
    save(adapter, tmp_path / "s.safetensors")
    for file in ("e.safetensors", "s.safetensors"):
        found = open_safely(tmp_path / file).metadata
        assert json.loads(found["ss_tag_frequency"]) == {"both": {"<tom>": 12, "ein Bär": 12}}
        assert json.loads(found["trained_words"]) == ["<tom>", "ein Bär"]
        assert found["modelspec.trigger_phrase"] == "<tom>, ein Bär"


@pytest.mark.parametrize(
    "metadata",
    [
        {"modelspec.trigger_phrase": "<tom>, ein Bär", "trained_words": "other"},
        {"trained_words": '["<tom>", "ein Bär", "<tom>"]'},
        {"trained_words": " <tom> ,ein Bär,"},
        {"ss_tag_frequency": '{"10_tom": {"<tom>": 12, "ein Bär": 12, "sitting": 3}}'},
    ],
)
def test_words_are_read_from_wherever_programs_write_them(tmp_path: Path, metadata: dict[str, str]) -> None:
    parts = {f"{NAME}.lora_down.weight": torch.ones(2, 5), f"{NAME}.lora_up.weight": torch.ones(6, 2)}
    safetensors.torch.save_file(parts, tmp_path / "a.safetensors", metadata=metadata)
    assert import_lora(tmp_path / "a.safetensors").provenance.trigger_words == ("<tom>", "ein Bär")
