"""Concept Slider: a named run on the host's own model that learns a direction between two prompts.

The model draws a few pictures of the neutral prompt; then the trainer's loop runs on it as in
:mod:`..training.run`, towards the prediction that :mod:`spectral_core.training.objectives.slider` says.

Shapes: those of :mod:`..training.model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.adapter.fingerprint import fingerprint
from ....spectral_core.training.config import defaults
from ....spectral_core.training.data.order import Order
from ....spectral_core.training.engine.loop import Setup
from ....spectral_core.training.engine.named_run import Prepared, Trained
from ....spectral_core.training.objectives.slider import SliderDenoiser, SliderNoise, examples
from ....spectral_core.training.runs.place import Place
from ..training import data as training_data
from ..training import identity
from ..training import layers as training_layers
from ..training import model as training_model
from ..training import start as training_start
from ..training.defaults import channels
from ..training.progress import Progress
from . import drawing, statistics
from .slider_job import Job

NODE = "Concept Slider"
_PASSES = 3  # neutral, positive and negative in one call


@dataclass(frozen=True)
class Inputs:
    """The MODEL, its CLIP, and a LATENT whose size is used (or None)."""

    model: Any
    clip: Any
    latent: Any = None


def run(job: Job, given: Inputs, said: Sequence[str] = ()) -> Trained:
    """Train the slider, or go on with it, or return what it has made; raises as
    :func:`..training.run.run`. The MODEL is afterwards as it was. said: notes on
    the job, told with the others."""
    job, notes = _fitted(job, given.model)
    with torch.inference_mode(False), torch.no_grad():
        _, weights, more = training_start.layers(job, given.model, given.clip)
        origin = training_start.Origin(given.model, None, weights, fingerprint(weights))
    shape = statistics.empty_latent(given.model, given.latent).shape
    settings: dict[str, Any] = {
        "slider": {**job.settings(), "precision": job.precision, "latent": list(shape[1:])},
        "model": identity.digest_of_weights(given.model),
        "clip": identity.digest_of_weights(given.clip.patcher),
    }
    if patches := identity.patches_of(given.model, given.clip):
        settings["patches"] = patches
    progress = Progress(job.config.steps, job.run_name.strip(), NODE)
    begin, prepare = partial(training_start.begin, job, origin), partial(_prepared, job, given)
    said = [*said, *notes, *more]
    return progress.carry_out(job.config, settings, begin, prepare, said, job.checkpoint_every)


def _fitted(job: Job, model: Any) -> tuple[Job, list[str]]:
    """The job with the rate that suits the model where none is given."""
    width, config = channels(model), replace(job.config, caption_dropout=0.0)
    if not config.learning_rate and 0 < width < defaults.NARROW:
        config = replace(config, learning_rate=defaults.usual_rate(job.method, width))
    note = defaults.rate_note(config, job.method, width)
    return replace(job, config=config), [note] if note else []


@contextmanager
def _prepared(job: Job, given: Inputs, begun: Adapter, place: Place) -> Iterator[Prepared]:
    """The model with the slider in training on it."""
    shown = examples(job.neutral, job.positive, job.negative, job.preserve, job.samples)
    latents = _samples(job, given, [example.neutral for example in shown[::2]])
    place_of = {text: -1 - i for i, text in enumerate(job.texts)}
    entries: dict[int | None, Any] = {
        place: training_data.encode_caption(given.clip, text) for text, place in place_of.items()
    }
    shape = (_PASSES * job.config.batch_size, *latents[0].shape)
    with training_model.ready(given.model, job.precision, shape) as ready, ExitStack() as undo:
        config = replace(job.config, precision=ready.precision)
        trees = training_layers.trees(ready.patcher)
        attachments = training_layers.attached(undo, begun, trees, ready.device, strict=True)
        conditions = training_model.Conditions(ready.patcher, entries, latents)
        denoiser = training_model.Denoiser(ready, conditions)

        def predict(noisy: Tensor, timesteps: Tensor, prompts: Any) -> Tensor:
            return denoiser(noisy, timesteps, [place_of[text] for text in prompts])

        noise = SliderNoise(ready.noise, job.start)
        setup = Setup(
            denoiser=SliderDenoiser(predict, attachments, noise, shown, job.eta),
            latents=[latent.to(ready.device) for latent in latents for _ in (1, -1)],
            order=Order(shown, config.batch_size, config.seed),
            diffusion=noise,
            attachments=attachments,
            roots=[ready.root],
            recast=ready.streams.again,
            make_room=ready.make_room,
        )
        yield Prepared(
            begun,
            setup,
            config,
            job.method,
            record={"slider": job.settings()},
            finish=lambda adapter: replace(adapter, schedule=job.schedule),
        )


def _samples(job: Job, given: Inputs, texts: list[str]) -> list[Tensor]:
    """Latents (C, h, w), as the model has them, of its own pictures of the neutral prompts."""
    empty = statistics.empty_latent(given.model, given.latent)
    bar = comfy.utils.ProgressBar(len(texts) * job.sample_steps)
    way = drawing.Way(job.sample_steps, job.guidance)
    negative = statistics.encoded(given.clip, "") if job.guidance > 1 else None
    found: dict[int, Tensor] = {}
    for text in dict.fromkeys(texts):
        places = [i for i, own in enumerate(texts) if own == text]
        seeds = [job.config.seed + i for i in places]
        positive = statistics.encoded(given.clip, text)
        drawn = drawing.draw(given.model, positive, negative, empty, seeds, way, bar.update)
        rows = [training_data.taken_in(given.model, row.float().cpu()) for row in drawn]
        found |= dict(zip(places, rows, strict=True))
    return [found[i] for i in range(len(texts))]
