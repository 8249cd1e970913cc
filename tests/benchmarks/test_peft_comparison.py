"""PEFT's comparison of image generation as a dry run: a random FLUX.2-klein of two blocks and DINOv2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein")

from benchmarks.claims import peft_comparison
from benchmarks.claims.lab import Lab
from benchmarks.claims.peft_comparison import METHODS, Comparison, Eye, Protocol, pictures_of
from spectral_core.errors import SpectralAdapterError

WIDTH = 24  # of a prompt's embeddings


@pytest.fixture(scope="module")
def protocol_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {
        "resolution": 32,
        "batch_size": 2,
        "max_steps": 3,
        "seed": 0,
        "grad_norm_clip": 1.0,
        "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 1e-4},
        "use_gc": True,
        "valid_size": 1,
        "test_size": 2,
        "num_inference_steps": 2,
        "guidance_scale": 3.5,
        "max_sequence_length": 4,
        "text_encoder_out_layers": [0, 1, 2],
        "instance_prompts": [f"picture {i}" for i in range(6)],
        "drift_image_prompts": ["a chair", "a horse"],
    }
    path = tmp_path_factory.mktemp("protocol") / "default_training_params.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def small_pipeline() -> Any:
    """Its text encoder is a table of random numbers by prompt."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
    ).eval()
    transformer = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()
    pipe = Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    for module in (vae, transformer):
        module.requires_grad_(False)
    encode = pipe.encode_prompt

    def encoded(prompt: Any = None, *, prompt_embeds: Any = None, **options: Any) -> Any:
        if prompt_embeds is None:
            seed = sum(map(ord, prompt))
            prompt_embeds = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(seed))
        return encode(prompt, prompt_embeds=prompt_embeds, device=torch.device("cpu"))

    pipe.encode_prompt = encoded
    return pipe


def small_eye() -> Eye:
    from transformers import Dinov2Config, Dinov2Model
    from transformers.feature_extraction_utils import BatchFeature

    torch.manual_seed(1)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)

    def processor(images: Any, return_tensors: str) -> Any:
        small = [np.asarray(p.resize((28, 28)), dtype=np.float32) / 255 for p in images]
        return BatchFeature({"pixel_values": torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)})

    return Eye(Dinov2Model(config).eval(), processor)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02d}.png")
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    return pictures_of(folder)


@pytest.fixture
def comparison(tmp_path: Path, protocol_file: Path, pictures: list[Image.Image]) -> Comparison:
    """At rates at which three steps can be seen in pictures of eight bits."""
    lab = Lab(tmp_path, replace(peft_comparison.SETTING, name="dry"))
    protocol = Protocol.read(protocol_file)
    found = Comparison(small_pipeline(), small_eye(), protocol, pictures, lab, rank=2, precision="fp32")
    found.entries = {name: replace(entry, rates=(0.3, 1.0)) for name, entry in found.entries.items()}
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_to_its_row(comparison: Comparison, name: str) -> None:
    before = {n: p.clone() for n, p in comparison.pipe.transformer.state_dict().items()}
    row = comparison.row(name)
    assert row["rate"] in comparison.entries[name].rates and row["mib"] > 0 and row["parameters"] > 0
    assert -1 <= row["similarity"] <= 1 and 0 < row["drift"] < 1, "three steps change what is drawn"
    assert all(torch.equal(p, before[n]) for n, p in comparison.pipe.transformer.state_dict().items())
    comparison.pipe = None
    assert comparison.row(name) == row, "a kept run is not made again"


def test_an_untrained_adapter_drifts_by_nothing(comparison: Comparison) -> None:
    fresh = comparison.fresh(comparison.entries["spectral_a"].config)
    assert comparison.drift(fresh) == pytest.approx(0, abs=1e-6)
    test = comparison.protocol.split()[2]
    assert comparison.similarity(fresh, test, 2) == pytest.approx(comparison.similarity(None, test, 2))
    assert len(fresh.layers) == 13, "what PEFT's own list of modules names"


def test_the_split_is_pefts(protocol_file: Path) -> None:
    """numpy's shuffle of seed 0; every picture is in one part."""
    protocol = Protocol.read(protocol_file)
    np.random.seed(0)
    order = np.arange(6)
    np.random.shuffle(order)
    assert [i for part in protocol.split() for i in part] == order.tolist()
    assert [len(part) for part in protocol.split()] == [3, 1, 2]


def test_what_is_missing_is_said(tmp_path: Path, comparison: Comparison) -> None:
    with pytest.raises(SpectralAdapterError, match=r"default_training_params\.json"):
        Protocol.read(tmp_path / "none.json")
    (tmp_path / "less.json").write_text('{"resolution": 512}', encoding="utf-8")
    with pytest.raises(SpectralAdapterError, match="no batch_size, max_steps"):
        Protocol.read(tmp_path / "less.json")
    with pytest.raises(SpectralAdapterError, match="2 pictures: the protocol has prompts for 6"):
        Comparison(
            comparison.pipe, comparison.eye, comparison.protocol, comparison.pictures[:2], comparison.lab
        )


def test_similarity_and_drift_are_pefts(comparison: Comparison) -> None:
    """What is drawn with the adapter lies 60° off in DINO's space: cosine ½, drift (1 − ½) / 2."""
    adapter = comparison.fresh(comparison.entries["lora"].config)
    comparison.drawn = lambda prompts, seed, on: [on] * len(prompts)  # type: ignore
    off = torch.tensor([0.5, 0.75**0.5])
    seen = {id(adapter): off}
    comparison.eye = SimpleNamespace(  # type: ignore
        embeddings=lambda pictures: torch.stack([seen.get(id(p), torch.tensor([1.0, 0.0])) for p in pictures])
    )
    assert comparison.drift(adapter) == pytest.approx(0.25)
    assert comparison.similarity(adapter, [0, 1], 3) == pytest.approx(0.5)
