"""The experiments' own eyes: a small network, trained here on the drawings, that reads styles, characters
and scene.

Trained on drawings as the autoencoder gives them back, roughened as samples are, in every combination of
styles; no picture of a training run is among them. ``features`` are its hidden state, of length one, around
the mean drawing.

Shapes: pictures (N, 3, 64, 64) in [0, 1]; features (N, 128); probabilities (N,).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims.drawings import CHARACTERS, STYLES, styled
from demo_model import draw
from demo_model.classifier import Classifier
from spectral_core.pipelines.concept import encode_pictures
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


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """(N, 3, 64, 64) in [0, 1]."""
    arrays = np.stack([np.asarray(p.convert("RGB"), dtype=np.float32) for p in pictures])
    return torch.from_numpy(arrays / 255).permute(0, 3, 1, 2)


def as_pictures(images: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [0, 1] as pictures."""
    arrays = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(array) for array in arrays]


@torch.no_grad()
def seen_through(pipe: Any, images: Tensor) -> Tensor:
    """The pictures as the autoencoder gives them back, (N, 3, 64, 64) in [0, 1]."""
    parts = []
    for chunk in images.split(CHUNK):
        decoded = pipe.vae.decode(encode_pictures(pipe, chunk * 2 - 1) / pipe.vae.config.scaling_factor)
        parts.append((decoded.sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(parts)


def _lesson(count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Drawings and their labels: three scenes in any styles to one character."""
    pictures: list[Image.Image] = []
    truth: dict[str, list[int]] = {name: [] for name in LABELS}
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        rng = np.random.default_rng(seed)
        said = dict.fromkeys(LABELS, IGNORED)
        if seed % 4 == 0:
            name = str(rng.choice(CHARACTERS))
            pictures.append(draw.draw_concept(name, seed)[0])
            said |= {"character": LABELS["character"].index(name), "inked": 0, "poster": 0}
        else:
            scene = draw.random_scene(rng, evaluation=bool(rng.random() < 0.12), empty=0.0)
            styles = [style for style in STYLES if rng.random() < 0.5]
            pictures.append(styled(scene, seed, styles))
            said |= {"character": 0, **{style: int(style in styles) for style in STYLES}}
            said |= {
                "shape": LABELS["shape"].index(scene.shape),
                "colour": LABELS["colour"].index(scene.colour),
            }
        for label, value in said.items():
            truth[label].append(value)
    return as_tensor(pictures), {name: torch.tensor(values) for name, values in truth.items()}


class Judge:
    """Reads generated pictures. ``accuracy``: of each attribute on drawings that it did not learn from."""

    def __init__(self, model: Classifier, accuracy: dict[str, float]) -> None:
        self.model, self.accuracy = model, accuracy

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        found: Tensor = self.model.features(as_tensor(pictures))
        return found

    @torch.no_grad()
    def probability(self, name: str, value: str, pictures: Sequence[Image.Image]) -> Tensor:
        """How sure the judge is that each picture's attribute has this value."""
        return self.model(as_tensor(pictures))[name].softmax(1)[:, LABELS[name].index(value)]

    @torch.no_grad()
    def log_odds(self, name: str, value: str, pictures: Sequence[Image.Image]) -> Tensor:
        """The same without saturating: log p/(1 − p)."""
        logits = self.model(as_tensor(pictures))[name]
        place = LABELS[name].index(value)
        rest = torch.cat([logits[:, :place], logits[:, place + 1 :]], 1)
        return logits[:, place] - rest.logsumexp(1)

    def read(self, name: str, pictures: Sequence[Image.Image]) -> list[str]:
        """The most likely value for each picture."""
        found: list[str] = self.model.attributes(as_tensor(pictures))[name]
        return found


def judge(pipe: Any, folder: Path, count: int, steps: int) -> Judge:
    """The judge of a folder, or one trained now on ``count`` drawings."""
    path = folder / f"judge_{count}_{steps}.safetensors"
    model = Classifier(LABELS)
    if path.exists():
        tensors = load_file(path)
        accuracy = {name: float(tensors.pop(f"accuracy.{name}")) for name in LABELS}
        model.load_state_dict(tensors)
        return Judge(model.eval().requires_grad_(False), accuracy)
    images, truth = _lesson(count)
    images = seen_through(pipe, images)
    learned = count * 9 // 10
    _train(model, images[:learned], {k: v[:learned] for k, v in truth.items()}, steps)
    accuracy = _accuracy(model, images[learned:], {k: v[learned:] for k, v in truth.items()})
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state | {f"accuracy.{k}": torch.tensor(v) for k, v in accuracy.items()}, partial)
    partial.replace(path)
    return Judge(model.requires_grad_(False), accuracy)


def _train(model: Classifier, images: Tensor, truth: dict[str, Tensor], steps: int) -> None:
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(images), (48,))
        logits = model.train()(roughen(images[index]))
        loss = torch.stack(
            [F.cross_entropy(v, truth[n][index], ignore_index=IGNORED) for n, v in logits.items()]
        )
        optimiser.zero_grad(set_to_none=True)
        loss.sum().backward()
        optimiser.step()
        schedule.step()
    centre(model.eval(), images[:1000])


@torch.no_grad()
def _accuracy(model: Classifier, images: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
    found = {}
    for name, logits in model(images).items():
        known = truth[name] != IGNORED
        found[name] = float((logits.argmax(1) == truth[name])[known].float().mean())
    return found
