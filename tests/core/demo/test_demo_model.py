"""The embedded demo model: loads offline, is small, writes any word, draws what held-out prompts say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from demo_model import draw, pictures
from demo_model.classifier import load_classifier

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parents[3] / "demo_model"


@pytest.fixture(scope="module")
def pipeline():
    """The shipped pipeline in fp32, without progress bars."""
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(
        FOLDER, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def reader():
    return load_classifier(FOLDER / "classifier")


def held_out(count: int, seed: int) -> list[draw.Scene]:
    rng = np.random.default_rng(seed)
    return [draw.random_scene(rng, evaluation=True) for _ in range(count)]


def test_size_and_file_kinds():
    files = [f for f in FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    weights = sum(f.stat().st_size for f in files if f.suffix == ".safetensors")
    assert weights > 4e6
    assert sum(f.stat().st_size for f in files) <= 24e6
    allowed = {".safetensors", ".json", ".txt", ".md", ".py", ".jpg"}
    assert {f.suffix for f in files} <= allowed


def test_parts_have_the_promised_form(pipeline):
    assert type(pipeline.vae).__name__ == "AutoencoderKL"
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"
    assert pipeline.unet.config.norm_num_groups == pipeline.vae.config.norm_num_groups == 32
    assert all(c % 32 == 0 for c in pipeline.unet.config.block_out_channels)
    assert pipeline.vae.config.latent_channels == pipeline.unet.config.in_channels == 4
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.text_encoder.config.hidden_size == pipeline.unet.config.cross_attention_dim
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in part.parameters())


@pytest.mark.parametrize(
    "words", ["a small red circle on a blue background", "zqxw bot77", "naïve 漢字 🎨", "!?#~|", "a"]
)
def test_tokenizer_writes_any_word(pipeline, words):
    ids = pipeline.tokenizer(words).input_ids
    body = ids[1:-1]
    assert ids[0] == pipeline.tokenizer.bos_token_id and ids[-1] == pipeline.tokenizer.eos_token_id
    assert body and pipeline.tokenizer.unk_token_id not in body
    decoded = pipeline.tokenizer.decode(body, clean_up_tokenization_spaces=False)
    assert decoded.replace(" ", "") == words.replace(" ", "").lower()


def test_tokenizer_files_agree(pipeline):
    vocabulary = json.loads((FOLDER / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary == pipeline.tokenizer.get_vocab()
    assert len(vocabulary) == pipeline.text_encoder.config.vocab_size
    for word in [*draw.SHAPES, *draw.COLOURS, "background"]:
        assert f"{word}</w>" in vocabulary


def test_latents_have_unit_variance(pipeline):
    rng = np.random.default_rng(1)
    drawn = np.stack([np.asarray(draw.draw_scene(s, rng)) for s in held_out(24, 1)])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.mode()
        output = pipeline.vae.decode(latents).sample
    assert 0.7 < (latents * pipeline.vae.config.scaling_factor).std() < 1.3
    assert (output - images).abs().mean() / 2 < 0.04


def test_samples_show_what_the_prompt_says(pipeline, reader):
    wanted = held_out(12, 5)
    prompts = [draw.full_caption(s) for s in wanted]
    generator = torch.Generator().manual_seed(5)
    images = pipeline(
        prompts,
        num_inference_steps=12,
        guidance_scale=4.0,
        generator=generator,
        output_type="pt",
    ).images
    found = reader.attributes(images)
    for name, least in (("shape", 10), ("colour", 11)):  # chance: 1.5; measured over 500: see quality.json
        right = sum(f == getattr(s, name) for f, s in zip(found[name], wanted, strict=True))
        assert right >= least, (name, right, list(zip(prompts, found[name], strict=True)))


def test_classifier_reads_drawings_and_its_configuration(reader):
    config = json.loads((FOLDER / "classifier" / "config.json").read_text(encoding="utf-8"))
    assert config["labels"] == reader.labels
    assert reader.labels["shape"] == [*pictures.OBJECTS, draw.NONE]
    assert reader.labels["character"] == [draw.NONE, *draw.CONCEPTS]
    assert reader.labels["colour"] == list(draw.COLOURS)
    assert sum(p.numel() for p in reader.parameters()) <= 500_000
    rng, wanted = np.random.default_rng(3), held_out(60, 3)
    drawn = np.stack([np.asarray(draw.draw_scene(s, rng)) for s in wanted])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    for name, found in reader.attributes(images).items():
        if hasattr(wanted[0], name):  # not what only pairs have
            right = sum(f == getattr(s, name) for f, s in zip(found, wanted, strict=True))
            assert right >= 54, (name, right)
    features = reader.features(images)
    assert features.shape == (60, config["features"])
    assert torch.allclose(features.norm(dim=1), torch.ones(60), atol=1e-4)


@pytest.mark.parametrize("name", list(draw.CONCEPTS))
def test_concepts_are_seeded_varied_and_unlike_each_other(reader, name):
    first, caption = draw.draw_concept(name, 0, token="zqx")
    assert "zqx" in caption and first.size == (draw.PIXELS, draw.PIXELS)
    assert np.array_equal(first, draw.draw_concept(name, 0)[0])
    assert not np.array_equal(first, draw.draw_concept(name, 1)[0])
    assert name not in draw.SHAPES


def test_held_out_combinations_never_reach_the_training_data():
    rng = np.random.default_rng(0)
    drawn = [draw.random_scene(rng) for _ in range(3000)]
    assert not any(draw.held_out(s.shape, s.colour, s.background) for s in drawn if s.shape != draw.NONE)
    kept = held_out(200, 0)
    assert all(draw.held_out(s.shape, s.colour, s.background) for s in kept)
    assert all(dataclasses.asdict(s)["shape"] in draw.SHAPES for s in kept)
