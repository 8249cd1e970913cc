"""Measure the model: samples of held-out prompts with one object, two, and two in a wide picture, read by its
own classifier."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from demo_model import draw
from demo_model.classifier import Classifier, load_classifier
from demo_model.pictures import (
    PIXELS,
    WIDE,
    Picture,
    draw_picture,
    draw_wide,
    full_caption,
    random_picture,
    random_wide_picture,
)

from .autoencoder import examples, psnr
from .common import MODEL, progress, to_tensor
from .quick import quicken
from .reader import applies
from .unet import GUIDANCE, STEPS, sample

SAMPLES, SEED = 500, 99  # of one object; of two there are fewer
SHEET_WIDTH = 804


def agreement(reader: Classifier, images: Tensor, wanted: list[Picture]) -> dict[str, dict[str, float]]:
    """Per attribute: how many pictures are read as the prompt says, of how many, and the ratio."""
    out = {}
    for name, found in reader.attributes(images).items():
        hits = [f == getattr(p, name) for f, p in zip(found, wanted, strict=True) if applies(name, p)]
        if hits:
            out[name] = {"right": sum(hits), "of": len(hits), "accuracy": round(sum(hits) / len(hits), 4)}
    return out


def halves(images: Tensor, wanted: list[Picture]) -> tuple[Tensor, list[Picture]]:
    """Each half of wide pictures with its edges drawn out to a square, (2 N, 3, 128, 128), as the classifier
    knows one large object, and the object that it should show."""
    side, missing = images.shape[-1] // 2, images.shape[-2] - images.shape[-1] // 2
    both = torch.cat([images[..., :side], images[..., side:]])
    squares = F.pad(both, (missing // 2, missing - missing // 2, 0, 0), mode="replicate")
    seconds = [replace(p, shape=p.second, colour=p.second_colour, texture=p.second_texture) for p in wanted]
    return squares, [*wanted, *seconds]


def shape_by_size(reader: Classifier, images: Tensor, wanted: list[Picture]) -> dict[str, dict[str, float]]:
    """The same for the shape alone, of small and of large objects."""
    found, out = reader.attributes(images)["shape"], {}
    for size in draw.SIZES:
        hits = [f == s.shape for f, s in zip(found, wanted, strict=True) if s.size == size]
        out[size] = {"right": sum(hits), "of": len(hits), "accuracy": round(sum(hits) / len(hits), 4)}
    return out


@dataclass(frozen=True)
class Kind:
    """What is asked for: one object, two, or two in a wide picture; and how a classifier reads it."""

    name: str
    count: int

    def held_out(self, seed: int) -> list[Picture]:
        rng = np.random.default_rng(seed)
        if self.wide:
            return [random_wide_picture(rng, evaluation=True) for _ in range(self.count)]
        return [random_picture(rng, evaluation=True, pair=self.name == "pairs") for _ in range(self.count)]

    @property
    def wide(self) -> bool:
        return self.name == "wide"

    @property
    def width(self) -> int:
        return WIDE[0] if self.wide else PIXELS

    def drawn(self, seed: int) -> tuple[Tensor, list[Picture]]:
        """Held-out drawings, and what they show."""
        wanted, rng = self.held_out(seed), np.random.default_rng(seed)
        draw_one = draw_wide if self.wide else draw_picture
        return to_tensor(draw.draw_many(lambda i: draw_one(wanted[i], rng), self.count)), wanted

    def read(self, reader: Classifier, images: Tensor, wanted: list[Picture]) -> dict[str, dict[str, float]]:
        """See :func:`agreement`; of a wide picture's objects what can be seen of each alone."""
        if not self.wide:
            return agreement(reader, images, wanted)
        found = agreement(reader, *halves(images, wanted))
        return {name: found[name] for name in ("shape", "colour", "texture")}


@torch.no_grad()
def give_back(pipeline: StableDiffusionPipeline, images: Tensor, batch: int = 25) -> Tensor:
    """Pictures as the autoencoder gives them back."""
    out = []
    for part in (images.to(pipeline.device) * 2 - 1).split(batch):
        latents = pipeline.vae.encode(part).latent_dist.mode()
        out.append(pipeline.vae.decode(latents).sample.cpu().clamp(-1, 1) / 2 + 0.5)
    return torch.cat(out)


@torch.no_grad()
def reconstruction(pipeline: StableDiffusionPipeline) -> dict[str, float]:
    """PSNR of the autoencoder in dB on characters and held-out pictures that it never saw."""
    out = {}
    for name, images in examples().items():
        latents = pipeline.vae.encode(images.to(pipeline.device)).latent_dist.mode()
        out[f"{name}_db"] = round(psnr(images, pipeline.vae.decode(latents).sample.cpu()), 2)
        out["latent_std"] = round((latents * pipeline.vae.config.scaling_factor).std().item(), 3)
    return out


def sheet(images: Tensor, prompts: list[str]) -> Image.Image:
    """The pictures at their own size, each with its prompt underneath."""
    height, width = images.shape[-2:]
    columns = SHEET_WIDTH // width
    cell, text = SHEET_WIDTH // columns, 40
    rows = -(-len(prompts) // columns)
    out = Image.new("RGB", (SHEET_WIDTH, rows * (height + 6 + text)), "white")
    pen = ImageDraw.Draw(out)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = i % columns * cell, i // columns * (height + 6 + text)
        array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        out.paste(Image.fromarray(array), (x + 3, y + 3))
        words, lines = prompt.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > width // 6:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((x + 4, y + height + 4), "\n".join(lines[:3]), fill="black", spacing=1)
    return out


def above_each_other(sheets: list[Image.Image]) -> Image.Image:
    out = Image.new("RGB", (SHEET_WIDTH, sum(s.height for s in sheets)), "white")
    top = 0
    for each in sheets:
        out.paste(each, (0, top))
        top += each.height
    return out


def folder_bytes() -> int:
    return sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file() and "__pycache__" not in f.parts)


def evaluate(device: str, count: int = SAMPLES, batch: int = 25) -> None:
    """Write ``quality.json`` and ``samples.jpg`` beside the weights."""
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
    pipeline.to(device).set_progress_bar_config(disable=True)
    quicken(pipeline.unet)
    quicken(pipeline.vae)
    reader, started = load_classifier(MODEL / "classifier"), time.monotonic()
    kinds = (Kind("one", count), Kind("pairs", count * 2 // 5), Kind("wide", count // 5))
    report: dict[str, object] = {
        "what": "held-out prompts (full captions), samples read by the classifier beside this file",
        "samples": {kind.name: kind.count for kind in kinds},
        "sampler": "DDIM",
        "steps": STEPS,
        "guidance": GUIDANCE,
        "weights": "fp16 files, run in fp32",
    }
    sheets = []
    for kind in kinds:
        wanted = kind.held_out(SEED)
        prompts = [full_caption(p) for p in wanted]
        starts = range(0, kind.count, batch)
        parts = [sample(pipeline, prompts[i : i + batch], SEED + i, width=kind.width) for i in starts]
        images = torch.cat(parts)
        drawn, truth = kind.drawn(SEED + 1)
        report[kind.name] = {
            "generated": kind.read(reader, images, wanted),
            "drawn": kind.read(reader, drawn, truth),
            "given_back": kind.read(reader, give_back(pipeline, drawn), truth),  # the most samples can reach
        }
        if kind.name == "one":
            report["shape_by_size"] = shape_by_size(reader, images, wanted)
        first = 12 if kind.wide else 18
        sheets.append(sheet(images[:first], prompts[:first]))
    report["seconds_per_sample"] = round((time.monotonic() - started) / sum(k.count for k in kinds), 3)
    report["autoencoder"] = reconstruction(pipeline)
    report["training"] = progress()
    above_each_other(sheets).save(MODEL / "samples.jpg", quality=85)
    (MODEL / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=1), f"{folder_bytes() / 1e6:.2f} MB", flush=True)
