"""Other people's LoRA files through the commands: nothing is silent, and what is written says what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectral_core import load
from spectral_core.cli.main import main
from spectral_core.files.lora_import import read_lora
from spectral_core.maths.lowrank import delta

WAN = "diffusion_model.blocks.0.self_attn.q"
Z_IMAGE = "diffusion_model.layers.0.attention"


def pair(name: str) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.randn(4, 64), f"{name}.lora_up.weight": torch.randn(64, 4)}


def written(tmp_path: Path, tensors: dict[str, Tensor]) -> tuple[str, Path]:
    save_file(tensors, tmp_path / "a.safetensors")
    return str(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"


def test_a_word_that_lies_in_the_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word = {"bundle_emb.vase.clip_l": torch.randn(2, 768)}
    file, out = written(tmp_path, pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q") | word)
    assert main(["export", file, "-o", str(out)]) == 0
    said = "".join(capsys.readouterr())
    assert "the file holds the trained words vase, which were left out" in said


def test_changed_biases_are_fused_with_the_pairs(tmp_path: Path) -> None:
    """Files of distilled video models have them beside every pair."""
    file, out = written(tmp_path, pair(WAN) | {f"{WAN}.diff_b": torch.randn(64)})
    assert main(["fuse", file, file, "-o", str(out)]) == 0
    assert list(load(out).layers) == [WAN, f"{WAN}.bias"]
    assert torch.allclose(
        delta(load(out).layers[f"{WAN}.bias"].factors()).flatten(), 2 * load_file(file)[f"{WAN}.diff_b"]
    )


def test_names_of_rows_of_a_fused_weight_stay_as_they_came(tmp_path: Path) -> None:
    """ComfyUI's own map knows them with their dots, and no other spelling of them."""
    names = (f"{Z_IMAGE}.to_q", f"{Z_IMAGE}.to_out.0")
    file, out = written(tmp_path, pair(names[0]) | pair(names[1]))
    assert main(["export", file, "-o", str(out), "--dtype", "fp32"]) == 0
    assert {key.rpartition(".lora_")[0] for key in load_file(out) if ".lora_" in key} == set(names)
    for name, layer in read_lora(out).adapter.layers.items():
        wanted = read_lora(file).adapter.layers[name].factors()
        assert torch.allclose(delta(layer.factors()), delta(wanted), atol=1e-5)


def test_a_size_that_no_model_draws_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", "demo_model", "--prompt", "a red circle", "--steps", "1"]
    assert main([*command, "--size", "60", "-o", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --size 60x60: expected multiples of 8")
