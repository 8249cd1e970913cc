"""Train a concept slider on a diffusers pipeline: two prompts in, an adapter out; see
:mod:`..training.objectives.slider`.

    job = SliderJob("a large {}", "a small {}", "a {}", preserve=("red star", "blue ring"))
    done = train_slider(pipe, job, TrainConfig(steps=200), Output(Path("adapters"), "size"))
    with apply(pipe, done.adapter.scaled(-1.5)):
        ...

Shapes: sizes are (width, height) in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter, Provenance
from ..adapter.fingerprint import digest_of, fingerprint
from ..attach.attaching import attach
from ..attach.targets import find_targets
from ..maths.svd_cache import SVDCache
from ..training.config.config import TrainConfig
from ..training.data.order import Order
from ..training.engine.checks import fitting
from ..training.engine.columns import basis_source
from ..training.engine.loop import Setup
from ..training.engine.named_run import Output, Prepared, Reserve, Trained, named_run, new_adapter
from ..training.objectives.slider import (
    SliderDenoiser,
    SliderExample,
    SliderNoise,
    SliderSettings,
    examples,
)
from ..training.runs.place import Place
from .conditioning import CaptionCache
from .loading import diffusion_of, family_of, native_size, parts_of


class SliderJob(SliderSettings):
    """What :func:`train_slider` is asked for."""


def train_slider(
    pipe: Any,
    job: SliderJob,
    config: TrainConfig,
    output: Output,
    settings: Mapping[str, Any] | None = None,
) -> Trained:
    """Train the slider, or go on with it, or return what the run has made. The pipeline is afterwards as it
    was.

    settings: by which the run is known besides the job; ``model`` is told by its weights where it is not
    among them. Raises SpectralAdapterError as :func:`..training.engine.named_run.named_run`.
    """
    weights, notes = fitting(
        find_targets(parts_of(pipe)["unet"], "unet", job.targets)[0],
        job.method_config(job.columns or tuple(range(job.rank))),
    )
    provenance = Provenance(family=family_of(pipe), base=fingerprint(weights))
    known = {"slider": job.settings(), "model": digest_of(provenance.base), **(settings or {})}

    def begin(name: str, reserve: Reserve) -> tuple[Adapter, list[str]]:
        basis_of = partial(basis_source, cache=SVDCache(output.caches))
        return new_adapter(job, weights, replace(provenance, name=name), config.seed, reserve, basis_of)

    @contextmanager
    def prepare(begun: Adapter, place: Place) -> Iterator[Prepared]:
        shown = examples(job.neutral, job.positive, job.negative, job.preserve, job.samples)
        latents = _samples(pipe, job, shown[::2], config.seed)
        noise = SliderNoise(diffusion_of(pipe), job.start)
        captions = CaptionCache(pipe, job.size or native_size(pipe), keep=True)

        def predict(noisy: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
            conditioning = captions.encode(prompts)
            prediction: Tensor = pipe.unet(noisy.to(pipe.unet.dtype), timesteps, **conditioning).sample
            return prediction

        with attach(pipe.unet, begun, part="unet", trainable=True) as attachment:
            setup = Setup(
                denoiser=SliderDenoiser(predict, [attachment], noise, shown, job.eta),
                latents=latents.repeat_interleave(2, 0),
                order=Order(shown, config.batch_size, config.seed),
                diffusion=noise,
                attachments=[attachment],
                roots=[pipe.unet],
            )
            yield Prepared(
                begun,
                setup,
                replace(config, caption_dropout=0.0),
                job.method,
                record={"slider": job.settings()},
                finish=lambda adapter: replace(adapter, schedule=job.schedule),
            )

    return named_run(output, config, known, begin, prepare, notes)


@torch.no_grad()
def _samples(pipe: Any, job: SliderJob, shown: Sequence[SliderExample], seed: int) -> Tensor:
    """Latents (N, C, h, w) of the frozen model's own pictures of the neutral prompts."""
    width, height = job.size or native_size(pipe)
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
