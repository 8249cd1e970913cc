"""Paths, the training data and small helpers that every stage of the demo model's training shares."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from demo_model import draw

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "demo_model"
MODEL = ROOT / "demo_model"
SEED = 20251
SCENES, DOODLES = 24_000, 4_000


@dataclass
class Budget:
    """A stage's length: the learning rate falls to zero at ``steps`` or ``minutes``, whichever is first."""

    steps: int
    minutes: float
    warmup: int = 100
    spent: float = 0.0  # seconds before a resume

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    def progress(self, step: int) -> float:
        return min(1.0, max(step / self.steps, self.seconds() / 60 / self.minutes))

    def factor(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress(step)))
        return min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * cosine)


def draw_data() -> None:
    """Draw the training scenes and the autoencoder's doodles into the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if (CACHE / "doodles.npy").exists():
        return
    rng = np.random.default_rng(SEED)
    scenes = [draw.random_scene(rng) for _ in range(SCENES)]
    (CACHE / "scenes.json").write_text(json.dumps([asdict(s) for s in scenes]))
    np.save(CACHE / "pictures.npy", draw.draw_many(lambda i: draw.draw_scene(scenes[i], rng), SCENES))
    np.save(CACHE / "doodles.npy", draw.draw_many(lambda i: draw.draw_doodle(rng), DOODLES))


def scenes() -> list[draw.Scene]:
    return [draw.Scene(**s) for s in json.loads((CACHE / "scenes.json").read_text())]


def pictures(name: str = "pictures") -> np.ndarray:
    return np.load(CACHE / f"{name}.npy", mmap_mode="r")


def to_tensor(images: np.ndarray) -> Tensor:
    """(N, 64, 64, 3) uint8 -> (N, 3, 64, 64) float in [0, 1], channels last in memory."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255


def batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Sorted index batches over ``count`` items, shuffled anew each epoch, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for i in range(0, count - size + 1, size):
            yield np.sort(order[i : i + size])


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float = 0.998) -> None:
    """Exponential moving average of the weights, with a warm-up of its decay."""
    rate = 1 - min(decay, (1 + step) / (10 + step))
    for a, m in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(m, rate)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the workers, in one exchange."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def contact_sheet(images: Tensor, columns: int = 8) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] -> one uint8 picture with a two-pixel border around each."""
    n, _, h, w = images.shape
    rows = math.ceil(n / columns)
    sheet = np.zeros((rows * (h + 2), columns * (w + 2), 3), dtype=np.uint8)
    for i, image in enumerate((images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()):
        y, x = i // columns * (h + 2), i % columns * (w + 2)
        sheet[y : y + h, x : x + w] = image
    return sheet
