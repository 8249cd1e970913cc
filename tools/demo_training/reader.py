"""Train the attribute classifier on drawn pictures, roughened so that it also reads generated ones fairly."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from demo_model import draw
from demo_model.classifier import FEATURES, Classifier

from .common import CACHE, MODEL, SEED, Budget, batches, pictures, scenes, to_tensor

LABELS: dict[str, list[str]] = {
    "shape": [*draw.SHAPES, draw.NONE],
    "colour": list(draw.COLOURS),
    "size": list(draw.SIZES),
    "position": list(draw.POSITIONS),
    "texture": list(draw.TEXTURES),
    "background": list(draw.BACKGROUNDS),
    "shading": list(draw.SHADINGS),
}
OF_THE_OBJECT = ("colour", "size", "position", "texture")


def targets(known: list[draw.Scene]) -> dict[str, Tensor]:
    """Class indices per attribute; -100 (ignored) where an empty picture has no such thing."""
    out = {}
    for name, values in LABELS.items():
        empty = name in OF_THE_OBJECT
        out[name] = torch.tensor(
            [-100 if empty and s.shape == draw.NONE else values.index(getattr(s, name)) for s in known]
        )
    return out


def roughen(images: Tensor) -> Tensor:
    """What autoencoder and sampler do to a drawing: coarser pixels, blur, tint and noise, each on some."""
    n, device = len(images), images.device
    coarse = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="bilinear", align_corners=False)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, soft, torch.rand(n, 1, 1, 1, device=device).pow(2))
    images = torch.lerp(images, coarse, 0.7 * torch.rand(n, 1, 1, 1, device=device).pow(3))
    gain = 1 + 0.1 * (torch.rand(n, 3, 1, 1, device=device) - 0.5)
    noise = 0.1 * torch.rand(n, 1, 1, 1, device=device).pow(2)
    return (images * gain + noise * torch.randn_like(images)).clamp(0, 1)


def train(device: str, steps: int = 1500, minutes: float = 8.0, size: int = 40) -> None:
    """Train and write ``demo_model/classifier``: fp16 weights, labels in ``config.json``."""
    torch.manual_seed(SEED + 5)
    known, drawn, doodles = scenes(), pictures(), pictures("doodles")
    truth = targets(known)
    model = Classifier(LABELS).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    budget, step = Budget(steps, minutes), 0
    streams = batches(len(known), size, SEED + 6), batches(len(doodles), 2, SEED + 7)
    none = torch.full((2,), LABELS["shape"].index(draw.NONE))
    while budget.progress(step) < 1:
        index, odd = (next(s) for s in streams)
        logits = model(roughen(to_tensor(np.concatenate([drawn[index], doodles[odd]])).to(device)))
        loss = torch.zeros((), device=device)
        for name, value in logits.items():
            wanted = torch.cat([truth[name][index], none if name == "shape" else torch.full((2,), -100)])
            loss = loss + F.cross_entropy(value, wanted.to(device), label_smoothing=0.02)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * budget.factor(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if step % 50 == 0:
            print(f"classifier {step} loss {loss:.4f} {budget.seconds():.0f}s", flush=True)
        step += 1
    centre(model.eval(), to_tensor(drawn[:2000]).to(device))
    save(model, {"steps": step, "seconds": round(budget.seconds())})


@torch.no_grad()
def centre(model: Classifier, images: Tensor) -> None:
    """Remember the average hidden state, which ``features`` subtracts."""
    model.centre.copy_(torch.cat([model._hidden(part) for part in images.split(200)]).mean(0))


def save(model: Classifier, times: dict[str, int]) -> None:
    folder = MODEL / "classifier"
    folder.mkdir(exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.cpu().state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    config = {"labels": LABELS, "features": FEATURES, "image_size": 64}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (CACHE / "classifier_time.json").write_text(json.dumps(times))
