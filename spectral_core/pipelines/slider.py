"""Train a concept slider on a diffusers pipeline: two prompts in, an adapter out; see
:mod:`..training.objectives.slider`.

    job = SliderJob("a large {}", "a small {}", "a {}", preserve=("red star", "blue ring"))
    slider = train_slider(pipe, job, TrainConfig(steps=200, caption_dropout=0)).adapter
    with apply(pipe, slider.scaled(-1.5)):
        ...

Shapes: sizes are (width, height) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter, Provenance, create
from ..adapter.fingerprint import fingerprint
from ..attach.attaching import attach
from ..attach.targets import find_targets
from ..fusion import freeze
from ..maths.svd_cache import SVDCache, default_cache_folder
from ..training.config.config import TrainConfig
from ..training.data.order import Order
from ..training.engine.checks import fitting
from ..training.engine.loop import Setup, train
from ..training.objectives.slider import (
    SliderDenoiser,
    SliderExample,
    SliderNoise,
    SliderSettings,
    examples,
)
from ..training.runs.outcome import TrainResult
from ..training.runs.place import Run
from .concept import basis_source, diffusion_of
from .conditioning import CaptionCache
from .loading import family_of, parts_of


class SliderJob(SliderSettings):
    """What :func:`train_slider` is asked for."""


@dataclass(frozen=True)
class TrainedSlider:
    """The adapter, the run, and what the user should know."""

    adapter: Adapter
    result: TrainResult
    notes: tuple[str, ...]


def train_slider(
    pipe: Any, job: SliderJob, config: TrainConfig, name: str = "slider", run: Run | None = None
) -> TrainedSlider:
    """Train the slider, or go on with the run. The pipeline is afterwards as it was.

    Raises SpectralAdapterError before the first step for what can be known then, and as
    :func:`..training.engine.loop.train` later.
    """
    config = replace(config, caption_dropout=0.0)
    method = job.method_config(job.columns or tuple(range(job.rank)))
    found, _ = find_targets(parts_of(pipe)["unet"], "unet", job.targets)
    weights, notes = fitting(found, method)
    adapter = create(
        weights,
        method,
        basis_source(method, SVDCache(default_cache_folder())),
        torch.Generator().manual_seed(config.seed),
        Provenance(name=name, family=family_of(pipe), base=fingerprint(weights)),
    )
    shown = examples(job.neutral, job.positive, job.negative, job.preserve, job.samples)
    latents = _samples(pipe, job, shown[::2], config.seed)
    noise = SliderNoise(diffusion_of(pipe), job.start)
    captions = CaptionCache(pipe, job.size or _size(pipe), keep=True)

    def predict(noisy: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        conditioning = captions.encode(prompts)
        prediction: Tensor = pipe.unet(noisy.to(pipe.unet.dtype), timesteps, **conditioning).sample
        return prediction

    with attach(pipe.unet, adapter, part="unet", trainable=True) as attachment:
        setup = Setup(
            denoiser=SliderDenoiser(predict, [attachment], noise, shown, job.eta),
            latents=latents.repeat_interleave(2, 0),
            order=Order(shown, config.batch_size, config.seed),
            diffusion=noise,
            attachments=[attachment],
            roots=[pipe.unet],
        )
        result = train(setup, config, job.method, run=run)
        trained = attachment.to_adapter()
    record = {"slider": job.settings(), **config.as_dict(), "steps_done": len(result.losses)}
    record |= {} if result.gates is None else result.gates.record()
    trained = replace(trained, schedule=job.schedule).with_provenance(training=record)
    if config.freeze_gates and not result.stopped:
        trained = freeze(trained)
    return TrainedSlider(trained, result, (*notes, *result.notes))


def _size(pipe: Any) -> tuple[int, int]:
    side = int(pipe.unet.config.sample_size) * int(pipe.vae_scale_factor)
    return side, side


@torch.no_grad()
def _samples(pipe: Any, job: SliderJob, shown: Sequence[SliderExample], seed: int) -> Tensor:
    """Latents (N, C, h, w) of the frozen model's own pictures of the neutral prompts."""
    width, height = job.size or _size(pipe)
    parts = []
    for start in range(0, len(shown), 8):
        chunk = shown[start : start + 8]
        generators = [torch.Generator("cpu").manual_seed(seed + start + k) for k in range(len(chunk))]
        drawn = pipe(
            [example.neutral for example in chunk],
            num_inference_steps=job.sample_steps,
            guidance_scale=job.guidance,
            generator=generators,
            output_type="latent",
            width=width,
            height=height,
        )
        parts.append(drawn.images.float())
    return torch.cat(parts)
