"""The experiments' own eyes: a small network, trained here on the drawings, that reads styles, characters
and scene.

Trained on drawings as the autoencoder gives them back, roughened as samples are, in every combination of
styles; no picture of a training run is among them. ``features`` are its hidden state, of length one, around
the mean drawing.

Shapes: pictures (N, 3, H, W) in [0, 1]; features (N, 128); probabilities (N,).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims.drawings import CHARACTERS, STYLES, styled
from demo_model import draw
from demo_model.classifier import Classifier
from spectral_core.demo.scores import as_tensor
from spectral_core.pipelines.dataset import encode_pictures
from spectral_core.whole_file import write_whole
from tools.demo_training.reader import centre, roughen

LABELS = {
    "inked": ["no", "yes"],
    "poster": ["no", "yes"],
    "character": ["none", *CHARACTERS],
    "shape": list(draw.SHAPES),
    "colour": list(draw.COLOURS),
}
FIRST_SEED = 1_000_000  # far from every training picture's
IGNORED = -100
CHUNK = 50


@torch.no_grad()
def seen_through(pipe: Any, images: Tensor) -> Tensor:
    """The pictures as the autoencoder gives them back, (N, 3, H, W) in [0, 1]."""
    parts = []
    for chunk in images.split(CHUNK):
        decoded = pipe.vae.decode(encode_pictures(pipe, chunk * 2 - 1) / pipe.vae.config.scaling_factor)
        parts.append((decoded.sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(parts)


def _lesson(count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Drawings without and with their styles, and their labels: two scenes in any styles to one character."""
    plain: list[Image.Image] = []
    full: list[Image.Image] = []
    truth: dict[str, list[int]] = {name: [] for name in LABELS}
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        rng = np.random.default_rng(seed)
        said = dict.fromkeys(LABELS, IGNORED)
        if seed % 3 == 0:
            name = str(rng.choice(CHARACTERS))
            plain.append(draw.draw_concept(name, seed)[0])
            full.append(plain[-1])
            said |= {"character": LABELS["character"].index(name), "inked": 0, "poster": 0}
        else:
            scene = draw.random_scene(rng, evaluation=bool(rng.random() < 0.12), empty=0.0)
            styles = [style for style in STYLES if rng.random() < 0.5]
            plain.append(styled(scene, seed, ()))
            full.append(styled(scene, seed, styles))
            said |= {"character": 0, **{style: int(style in styles) for style in STYLES}}
            said |= {
                "shape": LABELS["shape"].index(scene.shape),
                "colour": LABELS["colour"].index(scene.colour),
            }
        for label, value in said.items():
            truth[label].append(value)
    labels = {name: torch.tensor(values) for name, values in truth.items()}
    return as_tensor(plain), as_tensor(full), labels


def _weathered(images: Tensor) -> Tensor:
    """Roughened, and as coarse as samples of few steps are: half of them seen at ¼ to ¾ of their width."""
    images = roughen(images)
    size = int(torch.randint(draw.PIXELS // 4, 3 * draw.PIXELS // 4 + 1, ()))
    coarse = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    coarse = F.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, coarse, images)


class Judge:
    """Reads generated pictures. ``accuracy``: of each attribute on drawings that it did not learn from."""

    def __init__(self, model: Classifier, accuracy: dict[str, float]) -> None:
        self.model, self.accuracy = model, accuracy

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        found: Tensor = self.model.features(as_tensor(pictures))
        return found

    @torch.no_grad()
    def probability(self, name: str, value: str, pictures: Sequence[Image.Image]) -> Tensor:
        """How sure the judge is of this value for each picture; for a style, how strong it is, 0 … 1."""
        return self.model(as_tensor(pictures))[name].softmax(1)[:, LABELS[name].index(value)]

    def read(self, name: str, pictures: Sequence[Image.Image]) -> list[str]:
        """The most likely value for each picture."""
        found: list[str] = self.model.attributes(as_tensor(pictures))[name]
        return found


def judge(pipe: Any, folder: Path, count: int, steps: int) -> Judge:
    """The judge of a folder, or one trained now on ``count`` drawings."""
    path = folder / f"judge_{draw.PIXELS}_{count}_{steps}.safetensors"
    model = Classifier(LABELS)
    if path.exists():
        tensors = load_file(path)
        accuracy = {name: float(tensors.pop(f"accuracy.{name}")) for name in LABELS}
        model.load_state_dict(tensors)
        return Judge(model.eval().requires_grad_(False), accuracy)
    plain, full, truth = _lesson(count)
    plain, full = seen_through(pipe, plain), seen_through(pipe, full)
    learned = count * 9 // 10
    _train(model, plain[:learned], full[:learned], {k: v[:learned] for k, v in truth.items()}, steps)
    accuracy = _accuracy(model, full[learned:], {k: v[learned:] for k, v in truth.items()})
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    write_whole(path, save(state | {f"accuracy.{k}": torch.tensor(v) for k, v in accuracy.items()}))
    return Judge(model.requires_grad_(False), accuracy)


def _train(model: Classifier, plain: Tensor, full: Tensor, truth: dict[str, Tensor], steps: int) -> None:
    """Styles are shown at every strength from none to full, and their answer is that strength."""
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(full), (48,))
        share = torch.rand(len(index))
        shown = torch.lerp(plain[index], full[index], share[:, None, None, None])
        logits = model.train()(_weathered(shown))
        losses = []
        for name, value in logits.items():
            wanted = truth[name][index]
            if name in STYLES:
                odds = value[:, 1] - value[:, 0]
                losses.append(F.binary_cross_entropy_with_logits(odds, wanted.float() * share))
            else:
                losses.append(F.cross_entropy(value, wanted, ignore_index=IGNORED))
        optimiser.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimiser.step()
        schedule.step()
    centre(model.eval(), full[:1000])


@torch.no_grad()
def _accuracy(model: Classifier, images: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
    found = {}
    for name, logits in model(images).items():
        known = truth[name] != IGNORED
        found[name] = float((logits.argmax(1) == truth[name])[known].float().mean())
    return found
