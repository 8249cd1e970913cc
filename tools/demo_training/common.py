"""Paths, the training data and small helpers that every stage of the demo model's training shares."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from demo_model import draw
from demo_model.figures import draw_figure
from demo_model.pictures import PIXELS, Picture, draw_picture, random_picture
from spectral_core.whole_file import whole_file, write_whole

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("DEMO_MODEL_CACHE", ROOT / ".cache" / "demo_model"))
MODEL = ROOT / "demo_model"
SEED = 20251
LOCAL_NOTES = ("_name_or_path", "is_local", "local_files_only")
CREATURES = 0.45  # of the objects: new characters are drawn as they are
DRAWN, DOODLES = 8_000, 4_000  # pictures for the autoencoder and the classifier; the denoiser's are latents


@dataclass
class Budget:
    """A stage's length: the learning rate falls as a cosine to zero at ``steps``."""

    steps: int
    warmup: int = 100
    spent: float = 0.0  # seconds before a resume

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    def factor(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * cosine)


def picture(number: int) -> tuple[Picture, Image.Image]:
    """The training picture of this number, always the same one."""
    rng = np.random.default_rng([SEED, number])
    shown = random_picture(rng, creatures=CREATURES)
    return shown, draw_picture(shown, rng)


def draw_doodle(number: int) -> Image.Image:
    """Two of three are creatures, the others polygons: without captions, for the autoencoder."""
    rng = np.random.default_rng([SEED + 1, number])
    return draw_figure(rng, PIXELS) if number % 3 else draw.draw_doodle(rng, PIXELS)


def draw_data() -> None:
    """Draw the pictures and doodles into the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    sets = {"pictures": (lambda i: picture(i)[1], DRAWN), "doodles": (draw_doodle, DOODLES)}
    for name, (draw_one, count) in sets.items():
        if not (CACHE / f"{name}.npy").exists():
            images = draw.draw_many(draw_one, count)
            with whole_file(CACHE / f"{name}.npy") as stream:
                np.save(stream, images)


def known(count: int = DRAWN) -> list[Picture]:
    """What the first ``count`` training pictures show."""
    return [random_picture(np.random.default_rng([SEED, i]), creatures=CREATURES) for i in range(count)]


def progress() -> dict[str, dict[str, int]]:
    """How far each stage's weights in the folder are: ``{"unet": {"steps": 500, "seconds": 300}}``."""
    path = MODEL / "training.json"
    found: dict[str, dict[str, int]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def note(stage: str, steps: int, seconds: float) -> None:
    """Write this stage's progress beside the weights."""
    known_so_far = progress() | {stage: {"steps": steps, "seconds": round(seconds)}}
    write_whole(MODEL / "training.json", json.dumps(known_so_far, indent=2) + "\n")


def forget_this_machine() -> None:
    """Take out of the configurations what the libraries note about the machine that saved them."""
    for path in MODEL.glob("*/*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = {k: v for k, v in found.items() if k not in LOCAL_NOTES}
        if kept != found:
            path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def pictures(name: str = "pictures") -> np.ndarray:
    """The drawn data of the cache. It has to be what the seeds draw now: captions are made from them."""
    found: np.ndarray = np.load(CACHE / f"{name}.npy", mmap_mode="r")
    for number in range(8):
        drawn = picture(number)[1] if name == "pictures" else draw_doodle(number)
        if not np.array_equal(found[number], np.asarray(drawn)):
            raise SystemExit(
                f"{CACHE}: {name}.npy holds other pictures than are drawn now; remove it and latents.pt"
            )
    return found


def to_tensor(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float in [0, 1], channels last in memory."""
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
