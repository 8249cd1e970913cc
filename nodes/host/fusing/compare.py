"""Compare Adapters: the same prompts and seeds drawn with one set of adapters after the other.

Shapes: pictures are RGB; an IMAGE is (N, H, W, 3) in 0 … 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.files.adapter_file import load
from ..apply import adapters as applying
from ..files import names, paths
from ..training.defaults import pixels_per_cell, usual_guidance, usual_size, usual_steps
from . import drawing, statistics

MOST = 144  # pictures


@dataclass(frozen=True)
class Column:
    """What one column of the grid is drawn with: nothing, one adapter, or several at once."""

    label: str
    adapters: tuple[Adapter, ...] = ()


@dataclass(frozen=True)
class Rows:
    """What every column is drawn of. steps, cfg 0: what suits the model; latent None: the model's size."""

    prompts: tuple[str, ...]
    negative: str
    seeds: tuple[int, ...]
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    latent: Any = None

    @property
    def labels(self) -> list[str]:
        several = len(self.seeds) > 1
        return [f"{p}, seed {s}" if several else p for p in self.prompts for s in self.seeds]


@dataclass(frozen=True)
class Grid:
    """pictures: rows × columns. seconds: of each column, its adapters' loading included."""

    pictures: list[list[Image.Image]]
    seconds: list[float]
    way: drawing.Way
    notes: list[str] = field(default_factory=list)

    @property
    def images(self) -> Tensor:
        """All of them as an IMAGE, row by row."""
        import numpy as np

        flat = [np.asarray(p, dtype=np.float32) / 255 for row in self.pictures for p in row]
        return torch.from_numpy(np.stack(flat))


def grid(columns: Sequence[Column], rows: Rows, model: Any, clip: Any, vae: Any) -> Grid:
    """Draw every picture. Raises SpectralAdapterError where nothing or too much is asked for, and as Apply
    Adapter does; the host's interrupt. MODEL and CLIP are not changed."""
    count = len(columns) * len(rows.labels)
    if not count:
        raise SpectralAdapterError("nothing to compare: write at least one prompt and connect an adapter")
    if count > MOST:
        raise SpectralAdapterError(
            f"{len(columns)} columns of {len(rows.labels)} pictures are {count}: expected at most {MOST}; "
            "take fewer strengths, prompts or seeds"
        )
    way = drawing.Way(
        rows.steps or usual_steps(model), rows.cfg or usual_guidance(model), rows.sampler, rows.scheduler
    )
    empty = _empty(model, vae, rows.latent)
    bar = comfy.utils.ProgressBar(count * way.steps)
    pictures: list[list[Image.Image]] = [[] for _ in rows.labels]
    seconds: list[float] = []
    for column in columns:
        started = time.monotonic()
        drawn = _column(column, rows, way, (model, clip, vae), empty, bar)
        for row, picture in zip(pictures, drawn, strict=True):
            row.append(picture)
        seconds.append(time.monotonic() - started)
    return Grid(pictures, seconds, way)


def _column(
    column: Column, rows: Rows, way: drawing.Way, given: tuple[Any, Any, Any], empty: Tensor, bar: Any
) -> list[Image.Image]:
    model, clip, vae = given
    negative = statistics.encoded(clip, rows.negative) if way.cfg != 1 else None
    for adapter in column.adapters:
        applied = applying.apply(adapter, model, clip, 1.0, 1.0)
        model, clip = applied.model, applied.clip
    found = []
    for prompt in rows.prompts:
        positive = statistics.encoded(clip, prompt)
        for latent in drawing.draw(model, positive, negative, empty, rows.seeds, way, bar.update):
            pixels = vae.decode(latent[None])
            found.append(_image(pixels.reshape(-1, *pixels.shape[-3:])[0]))
    return found


def _empty(model: Any, vae: Any, latent: Any) -> Tensor:
    """Zeros of the connected LATENT's size, else of the size that the model is made for."""
    if latent is None:
        cells = max(1, usual_size(model, pixels_per_cell(vae)) // pixels_per_cell(vae))
        latent = {"samples": torch.empty(1, 1, cells, cells)}
    return statistics.empty_latent(model, latent)


def _image(pixels: Tensor) -> Image.Image:
    """(H, W, 3) in 0 … 1."""
    return Image.fromarray((pixels.float().cpu().clamp(0, 1) * 255).round().byte().numpy())


def of_run(name: str) -> list[tuple[str, Adapter]]:
    """(label, adapter) of what a run of Train Adapter has kept: by Use now, in order of steps, and the end.

    Raises SpectralAdapterError where it has kept nothing.
    """
    parts = names.safe_parts(name, "run_name")
    if len(parts) != 1:
        raise SpectralAdapterError(f"run_name {name!r}: expected a plain name without slashes")
    kept = sorted((paths.step_of(path), path) for path in paths.unfinished_files(name))
    found = [(f"step {step}", load(path)) for step, path in kept]
    if (done := paths.finished_file(name)).is_file():
        steps = (adapter := load(done)).provenance.training.get("steps_done")
        found.append((f"finished, step {steps}" if steps else "finished", adapter))
    if not found:
        raise SpectralAdapterError(
            f"run {name!r}: nothing of it is kept; press Use now on its panel while it trains, or let it "
            "finish"
        )
    return found
