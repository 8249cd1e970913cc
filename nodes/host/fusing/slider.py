"""Concept Slider: a named run on the host's own model that learns a direction between two prompts.

The model draws a few pictures of the neutral prompt; then the trainer's loop runs on it as in
:mod:`..training.named_run`, towards the prediction that :mod:`spectral_core.training.objectives.slider` says.

Shapes: those of :mod:`..training.model`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.adapter.fingerprint import fingerprint
from ....spectral_core.attach.attaching import Attachment, attach
from ....spectral_core.files.adapter_file import load
from ....spectral_core.fusion import freeze
from ....spectral_core.training.config import defaults
from ....spectral_core.training.config.config import TrainConfig
from ....spectral_core.training.data.order import Order
from ....spectral_core.training.engine.loop import Setup
from ....spectral_core.training.objectives.slider import SliderDenoiser, SliderNoise, examples
from ....spectral_core.training.runs.finished import find_result
from ....spectral_core.training.runs.place import Run, take_place
from ..files import paths
from ..training import data as training_data
from ..training import identity
from ..training import layers as training_layers
from ..training import model as training_model
from ..training import start as training_start
from ..training.defaults import channels
from ..training.named_run import RUNS, losses_of
from ..training.progress import Progress
from ..training.run import At, Trained, keep, saved, train_explained
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
    :func:`..training.named_run.run`. The MODEL is afterwards as it was. said: notes on
    the job, told with the others."""
    job, notes = _fitted(job, given.model)
    notes = [*said, *notes]
    with torch.inference_mode(False), torch.no_grad():
        _, weights, more = training_start.layers(job, given.model, given.clip)  # type: ignore[arg-type]
        base = fingerprint(weights)
    shape = statistics.empty_latent(given.model, given.latent).shape
    settings: dict[str, Any] = {
        "config": job.config.as_dict(),
        "slider": {**job.settings(), "precision": job.precision, "latent": list(shape[1:])},
        "model": identity.digest_of_weights(given.model),
        "clip": identity.digest_of_weights(given.clip.patcher),
    }
    if patches := identity.patches_of(given.model, given.clip):
        settings["patches"] = patches
    folder = Path(folder_paths.get_output_directory(), paths.KEY)
    place = take_place(folder / RUNS, job.run_name.strip(), json.loads(json.dumps(settings)), extend=True)
    expected = find_result(place, folder)
    if place.state == "finished" and expected.is_there:
        with torch.inference_mode(False):
            path = expected.path
            return Trained(load(path), path, place.name, losses_of(place), 0.0, place.step, (), reused=True)
    notes += more
    if place.earlier:
        notes.append(f"run {place.earlier[0]} has other settings: this one is {place.name}")
    with ExitStack() as around:
        with torch.inference_mode(False), torch.no_grad():
            origin = training_start.Origin(given.model, None, weights, base, folder)
            begun, more = training_start.begin(around, job, origin, place, expected.path)  # type: ignore[arg-type]
        return _carry_out(job, given, begun, At(place, expected, settings, [*notes, *more]))


def _fitted(job: Job, model: Any) -> tuple[Job, list[str]]:
    """The job with the rate that suits the model where none is given."""
    width, config = channels(model), replace(job.config, caption_dropout=0.0)
    if not config.learning_rate and 0 < width < defaults.NARROW:
        config = replace(config, learning_rate=defaults.usual_rate(job.method, width))
    note = defaults.rate_note(config, job.method, width)
    return replace(job, config=config), [note] if note else []


def _carry_out(job: Job, given: Inputs, begun: Adapter, at: At) -> Trained:
    shown = examples(job.neutral, job.positive, job.negative, job.preserve, job.samples)
    latents = _samples(job, given, [example.neutral for example in shown[::2]])
    place_of = {text: -1 - i for i, text in enumerate(job.texts)}
    entries: dict[int | None, Any] = {
        place: training_data.encode_caption(given.clip, text) for text, place in place_of.items()
    }
    progress = Progress(at.place.name, job.config.steps, NODE, job.run_name)
    shape = (_PASSES * job.config.batch_size, *latents[0].shape)
    with training_model.ready(given.model, job.precision, shape) as ready, ExitStack() as undo:
        config = replace(job.config, precision=ready.precision)
        for note in at.notes:
            progress({"event": "warning", "step": 0, "text": note})
        trees = training_layers.trees(ready.patcher)
        attachments = [
            undo.enter_context(attach(trees[part], begun, part, trainable=True))
            for part in begun.parts
            if part in trees
        ]
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
        )
        around = Run(
            folder=at.place.folder,
            checkpoint_every=job.checkpoint_every,
            listener=progress,
            cancel=progress.cancel,
            settings={k: v for k, v in at.settings.items() if k != "config"},
        )

        def learned(steps: int) -> Adapter:
            return _learned(begun, attachments, job, config, steps)

        progress.keeps(at.place.folder, lambda steps: keep(learned(steps), at.place.name, steps))
        result = train_explained(setup, config, job.method, around, at.place)
        adapter = learned(len(result.losses))
        if result.gates is not None:
            adapter = adapter.with_provenance(
                training={**adapter.provenance.training, **result.gates.record()}
            )
        if config.freeze_gates and not result.stopped:
            adapter = freeze(adapter)
    return saved(adapter, result, at, progress, config, at.notes)


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


def _learned(
    begun: Adapter, attachments: list[Attachment], job: Job, config: TrainConfig, steps: int
) -> Adapter:
    layers = dict(begun.layers)
    for attachment in attachments:
        now = attachment.to_adapter().layers
        layers |= {name: now[name] for name, _ in attachment.modules()}
    record = {"slider": job.settings(), **config.as_dict(), "steps_done": steps}
    record["learning_rate"] = config.rate_for(job.method)
    told = {k: v for k, v in record.items() if v is not None}
    return replace(begun, layers=layers, schedule=job.schedule).with_provenance(training=told)
