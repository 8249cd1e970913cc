"""Measure the model: samples of held-out prompts with one object and with two, read by its own classifier."""

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
from demo_model.pictures import Picture, draw_picture, full_caption, random_picture

from .autoencoder import examples, psnr
from .common import MODEL, progress, to_tensor
from .quick import quicken
from .reader import applies
from .unet import GUIDANCE, STEPS, sample

SAMPLES, SEED = 500, 99
PAIRS = 200


def agreement(reader: Classifier, images: Tensor, wanted: list[Picture]) -> dict[str, dict[str, float]]:
    """Per attribute: how many pictures are read as the prompt says, of how many, and the ratio."""
    out = {}
    for name, found in reader.attributes(images).items():
        hits = [f == getattr(p, name) for f, p in zip(found, wanted, strict=True) if applies(name, p)]
        if hits:
            out[name] = {"right": sum(hits), "of": len(hits), "accuracy": round(sum(hits) / len(hits), 4)}
    return out


def shape_by_size(reader: Classifier, images: Tensor, wanted: list[Picture]) -> dict[str, dict[str, float]]:
    """The same for the shape alone, of small and of large objects."""
    found, out = reader.attributes(images)["shape"], {}
    for size in draw.SIZES:
        hits = [f == s.shape for f, s in zip(found, wanted, strict=True) if s.size == size]
        out[size] = {"right": sum(hits), "of": len(hits), "accuracy": round(sum(hits) / len(hits), 4)}
    return out


def held_out(count: int, seed: int, pair: bool) -> list[Picture]:
    rng = np.random.default_rng(seed)
    return [random_picture(rng, evaluation=True, pair=pair) for _ in range(count)]


def drawn(wanted: list[Picture], seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return to_tensor(draw.draw_many(lambda i: draw_picture(wanted[i], rng), len(wanted)))


def drawn_agreement(reader: Classifier, count: int, pair: bool) -> dict[str, dict[str, float]]:
    """The classifier on drawn held-out pictures: the most that samples could reach."""
    wanted = held_out(count, SEED + 1, pair)
    return agreement(reader, drawn(wanted, SEED + 1), wanted)


@torch.no_grad()
def reconstruction(pipeline: StableDiffusionPipeline) -> dict[str, float]:
    """PSNR of the autoencoder in dB on characters and held-out pictures that it never saw."""
    out = {}
    for name, images in examples().items():
        latents = pipeline.vae.encode(images.to(pipeline.device)).latent_dist.mode()
        out[f"{name}_db"] = round(psnr(images, pipeline.vae.decode(latents).sample.cpu()), 2)
        out["latent_std"] = round((latents * pipeline.vae.config.scaling_factor).std().item(), 3)
    return out


def sheet(images: Tensor, prompts: list[str], columns: int = 6) -> Image.Image:
    """The pictures at their own size, each with its prompt underneath."""
    cell, text = 134, 40
    rows = -(-len(prompts) // columns)
    out = Image.new("RGB", (columns * cell, rows * (cell + text)), "white")
    pen = ImageDraw.Draw(out)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = i % columns * cell, i // columns * (cell + text)
        array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        out.paste(Image.fromarray(array), (x + 3, y + 3))
        words, lines = prompt.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 21:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((x + 4, y + cell - 2), "\n".join(lines[:3]), fill="black", spacing=1)
    return out


def folder_bytes() -> int:
    return sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file() and "__pycache__" not in f.parts)


def evaluate(device: str, count: int = SAMPLES, pairs: int = PAIRS, batch: int = 25) -> None:
    """Write ``quality.json`` and ``samples.jpg`` beside the weights."""
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
    pipeline.to(device).set_progress_bar_config(disable=True)
    quicken(pipeline.unet)
    quicken(pipeline.vae)
    reader, started = load_classifier(MODEL / "classifier"), time.monotonic()
    report: dict[str, object] = {
        "what": "held-out prompts (full captions), samples read by the classifier beside this file",
        "samples": count,
        "samples_of_pairs": pairs,
        "sampler": "DDIM",
        "steps": STEPS,
        "guidance": GUIDANCE,
        "weights": "fp16 files, run in fp32",
    }
    shown, said = [], []
    for name, number in (("generated", count), ("generated_pairs", pairs)):
        pair = name == "generated_pairs"
        wanted = held_out(number, SEED, pair)
        prompts = [full_caption(p) for p in wanted]
        parts = [sample(pipeline, prompts[i : i + batch], SEED + i) for i in range(0, number, batch)]
        images = torch.cat(parts)
        report[name] = agreement(reader, images, wanted)
        report["drawn_pairs" if pair else "drawn"] = drawn_agreement(reader, number, pair)
        if not pair:
            report["generated_shape_by_size"] = shape_by_size(reader, images, wanted)
        shown += list(images[:18])
        said += prompts[:18]
    report["seconds_per_sample"] = round((time.monotonic() - started) / (count + pairs), 3)
    report["autoencoder"] = reconstruction(pipeline)
    report["training"] = progress()
    sheet(torch.stack(shown), said).save(MODEL / "samples.jpg", quality=85)
    (MODEL / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=1), f"{folder_bytes() / 1e6:.2f} MB", flush=True)
