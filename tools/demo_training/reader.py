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
from demo_model.pictures import OBJECTS, PIXELS, PLACES, POSITIONS, Picture

from .common import MODEL, SEED, Budget, batches, known, note, pictures, to_tensor

LABELS: dict[str, list[str]] = {
    "shape": [*OBJECTS, draw.NONE],
    "colour": list(draw.COLOURS),
    "size": list(draw.SIZES),
    "position": list(POSITIONS),
    "texture": list(draw.TEXTURES),
    "background": list(PLACES),
    "shading": list(draw.SHADINGS),
    "second": [*OBJECTS, draw.NONE],
    "second_colour": list(draw.COLOURS),
    "second_texture": list(draw.TEXTURES),
    "character": [draw.NONE, *draw.CONCEPTS],
}
OF_THE_OBJECT = ("colour", "size", "position", "texture")
OF_THE_SECOND = ("second_colour", "second_texture")
IGNORED = -100
CHARACTERS, FIRST_SEED = 1500, 1_000_000  # drawings of the demo's characters; seeds far from its pictures'


def applies(name: str, picture: Picture) -> bool:
    """Whether the picture has such a thing at all."""
    if name in OF_THE_OBJECT:
        return picture.shape != draw.NONE and not (name == "size" and picture.pair)
    if name == "character":  # pictures of the training show none
        return False
    return picture.pair if name in OF_THE_SECOND else True


def targets(shown: list[Picture]) -> dict[str, Tensor]:
    """Class indices per attribute; ignored where a picture has no such thing. None shows a character."""
    found = {
        name: torch.tensor([values.index(getattr(p, name)) if applies(name, p) else IGNORED for p in shown])
        for name, values in LABELS.items()
        if name != "character"
    }
    return found | {"character": torch.zeros(len(shown), dtype=torch.long)}


def characters(count: int = CHARACTERS) -> tuple[np.ndarray, Tensor]:
    """Drawings of the demo's characters, and which one each is: its place in the labels."""
    names = list(draw.CONCEPTS)
    images = draw.draw_many(
        lambda i: draw.draw_concept(names[i % len(names)], FIRST_SEED + i, pixels=PIXELS)[0], count
    )
    return images, torch.arange(count) % len(names) + 1


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


def train(device: str, steps: int = 3000, size: int = 40) -> None:
    """Train and write the model's ``classifier``: fp16 weights, labels in ``config.json``."""
    torch.manual_seed(SEED + 5)
    drawn, doodles = pictures(), pictures("doodles")[::3]  # the polygons among them
    known_ones, which = characters()
    truth = targets(known(len(drawn)))
    model = Classifier(LABELS).to(device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    budget = Budget(steps)
    counts = ((len(drawn), size), (len(doodles), 2), (len(known_ones), 8))
    streams = [batches(*pair, SEED + 6 + i) for i, pair in enumerate(counts)]
    none, ignored = (torch.full((2,), i) for i in (LABELS["shape"].index(draw.NONE), IGNORED))
    for step in range(steps):
        index, odd, own = (next(s) for s in streams)
        shown = np.concatenate([drawn[index], doodles[odd], known_ones[own]])
        images = roughen(to_tensor(shown).to(device))
        with torch.autocast(device, torch.bfloat16):
            logits = {name: value.float() for name, value in model(images).items()}
        loss = torch.zeros((), device=device)
        for name, value in logits.items():
            nothing = none if name in ("shape", "second") else ignored
            person = which[own] if name == "character" else torch.full((len(own),), IGNORED)
            wanted = torch.cat([truth[name][index], nothing, person])
            loss = loss + F.cross_entropy(value, wanted.to(device), label_smoothing=0.02)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * budget.factor(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if step % 50 == 0:
            print(f"classifier {step} loss {loss:.4f} {budget.seconds():.0f}s", flush=True)
    centre(model.eval(), to_tensor(drawn[:2000]).to(device))
    save(model)
    note("classifier", steps, budget.seconds())


@torch.no_grad()
def centre(model: Classifier, images: Tensor) -> None:
    """Remember the average hidden state, which ``features`` subtracts."""
    model.centre.copy_(torch.cat([model._hidden(part) for part in images.split(200)]).mean(0))


def save(model: Classifier) -> None:
    folder = MODEL / "classifier"
    folder.mkdir(exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.cpu().state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    config = {"labels": LABELS, "features": FEATURES}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
