"""Measure the shipped model: 500 samples of held-out prompts, read by the shipped classifier."""

from __future__ import annotations

import json
import time

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from demo_model import draw
from demo_model.classifier import Classifier, load_classifier

from .common import CACHE, MODEL, to_tensor
from .unet import GUIDANCE, STEPS, sample

SAMPLES, SEED = 500, 99


def agreement(reader: Classifier, images: Tensor, wanted: list[draw.Scene]) -> dict[str, dict[str, float]]:
    """Per attribute: how many pictures are read as the scene says, of how many, and the ratio."""
    out = {}
    for name, found in reader.attributes(images).items():
        right = sum(f == getattr(s, name) for f, s in zip(found, wanted, strict=True))
        out[name] = {"right": right, "of": len(wanted), "accuracy": round(right / len(wanted), 4)}
    return out


def shape_by_size(
    reader: Classifier, images: Tensor, wanted: list[draw.Scene]
) -> dict[str, dict[str, float]]:
    """The same for the shape alone, of small and of large objects."""
    found, out = reader.attributes(images)["shape"], {}
    for size in draw.SIZES:
        hits = [f == s.shape for f, s in zip(found, wanted, strict=True) if s.size == size]
        out[size] = {"right": sum(hits), "of": len(hits), "accuracy": round(sum(hits) / len(hits), 4)}
    return out


def held_out_scenes(count: int, seed: int) -> list[draw.Scene]:
    rng = np.random.default_rng(seed)
    return [draw.random_scene(rng, evaluation=True) for _ in range(count)]


def drawn(wanted: list[draw.Scene], seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return to_tensor(draw.draw_many(lambda i: draw.draw_scene(wanted[i], rng), len(wanted)))


def drawn_agreement(reader: Classifier) -> dict[str, dict[str, float]]:
    """The classifier on drawn held-out pictures: the most that samples could reach."""
    wanted = held_out_scenes(SAMPLES, SEED + 1)
    return agreement(reader, drawn(wanted, SEED + 1), wanted)


@torch.no_grad()
def reconstruction(pipeline: StableDiffusionPipeline) -> dict[str, float]:
    """Autoencoder on drawn held-out scenes: mean absolute error and PSNR, on [0, 1]."""
    images = drawn(held_out_scenes(100, SEED + 2), SEED + 2).to(pipeline.device)
    latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mode()
    output = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    mse = (output - images).square().mean(dim=(1, 2, 3))
    return {
        "l1": round((output - images).abs().mean().item(), 5),
        "psnr_db": round((-10 * mse.log10()).mean().item(), 2),
        "latent_std": round((latents * pipeline.vae.config.scaling_factor).std().item(), 3),
    }


def sheet(images: Tensor, prompts: list[str], columns: int = 6) -> Image.Image:
    """The pictures twice as large, each with its prompt underneath."""
    cell, text = 192, 40
    rows = -(-len(prompts) // columns)
    out = Image.new("RGB", (columns * cell, rows * (cell + text)), "white")
    pen = ImageDraw.Draw(out)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = i % columns * cell, i // columns * (cell + text)
        array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        large = Image.fromarray(array).resize((cell - 6, cell - 6), Image.Resampling.LANCZOS)
        out.paste(large, (x + 3, y + 3))
        words, lines = prompt.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 29:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((x + 4, y + cell - 2), "\n".join(lines[:3]), fill="black", spacing=1)
    return out


def folder_bytes() -> int:
    return sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file() and "__pycache__" not in f.parts)


def evaluate(device: str, count: int = SAMPLES, batch: int = 50) -> None:
    """Write ``demo_model/quality.json`` and ``demo_model/samples.jpg``."""
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
    pipeline.to(device).set_progress_bar_config(disable=True)
    reader, wanted = load_classifier(MODEL / "classifier"), held_out_scenes(count, SEED)
    prompts = [draw.full_caption(s) for s in wanted]
    started = time.monotonic()
    parts = [sample(pipeline, prompts[i : i + batch], SEED + i) for i in range(0, count, batch)]
    images, seconds = torch.cat(parts), time.monotonic() - started
    sheet(images[:36], prompts[:36]).save(MODEL / "samples.jpg", quality=85)
    times = {f.stem[:-5]: json.loads(f.read_text()) for f in sorted(CACHE.glob("*_time.json"))}
    report = {
        "what": "held-out prompts (full captions), samples read by demo_model/classifier",
        "samples": count,
        "sampler": "DDIM",
        "steps": STEPS,
        "guidance": GUIDANCE,
        "weights": "fp16 files, run in fp32",
        "generated": agreement(reader, images, wanted),
        "generated_shape_by_size": shape_by_size(reader, images, wanted),
        "drawn": drawn_agreement(reader),
        "autoencoder": reconstruction(pipeline),
        "seconds_per_sample": round(seconds / count, 3),
        "training": times,
    }
    (MODEL / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=1), f"{folder_bytes() / 1e6:.2f} MB", flush=True)
