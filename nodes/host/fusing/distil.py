"""Distil Adapters: a named run on the host's own model that teaches one adapter what several do.

Samples are drawn with each concept's adapter by the host's sampler; then the trainer's loop runs on the
model, with all the adapters and the student on it, one at a time active. Runs are kept where Train Adapter
keeps them.

Shapes: those of :mod:`..training.model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.statistics.prompts import without_concepts
from ....spectral_core.training.config.config import TrainConfig
from ....spectral_core.training.data.order import Order
from ....spectral_core.training.engine.loop import Setup
from ....spectral_core.training.engine.named_run import Prepared, Reserve, Trained
from ....spectral_core.training.objectives.distillation import (
    BASE,
    DistilDenoiser,
    DistilExample,
    drawn_as,
    examples,
    settled,
    student_of,
)
from ....spectral_core.training.objectives.towards_prediction import ResidualNoise
from ....spectral_core.training.runs.place import Place
from ..apply import adapters as applying
from ..model import places as keys
from ..training import data as training_data
from ..training import identity
from ..training import layers as training_layers
from ..training import model as training_model
from ..training.progress import Progress, check_interrupt
from . import drawing, statistics

NODE = "Distil Adapters"


@dataclass(frozen=True)
class Job:
    """run_name, training settings, precision, and how the samples are drawn; ``preserve``: prompts without
    any concept under which the model shall stay as it is."""

    run_name: str
    config: TrainConfig
    samples: int
    sample_steps: int
    cfg: float
    preserve: tuple[str, ...]
    precision: str = "auto"
    checkpoint_every: int = 100

    def settings(self) -> dict[str, Any]:
        """What the result depends on, JSON-able."""
        return {
            "samples": self.samples,
            "sample_steps": self.sample_steps,
            "cfg": self.cfg,
            "preserve": list(self.preserve),
            "precision": self.precision,
        }


@dataclass(frozen=True)
class Inputs:
    """The MODEL, its CLIP, the concepts' adapters at their strengths with their prompts, a latent whose size
    is used (or None), and what makes the fused adapter to begin with; ``fused_key``: what tells it from
    others."""

    model: Any
    clip: Any
    adapters: Sequence[Adapter]
    prompts: Sequence[Sequence[str]]
    latent: Any
    fused: Callable[[], Adapter]
    fused_key: str = ""


def run(job: Job, given: Inputs) -> Trained:
    """Distil, or go on with it, or return what it has made.

    Raises SpectralAdapterError before the first step for what can be known then, the host's interrupt where
    the user stops it (the checkpoint is kept), and whatever else ends a training. The MODEL is afterwards as
    it was.
    """
    for adapter in given.adapters:  # before anything is drawn
        _fitted(given, adapter)
    shape = statistics.empty_latent(given.model, given.latent).shape
    settings = {
        "distil": {**job.settings(), "size": list(shape[1:]), "prompts": [list(p) for p in given.prompts]},
        "adapters": [[a.content_hash, a.strength] for a in given.adapters],
        "fused": given.fused_key,
        "model": identity.digest_of_weights(given.model),
        "clip": identity.digest_of_weights(given.clip.patcher),
    }
    if patches := identity.patches_of(given.model, given.clip):
        settings["patches"] = patches
    progress = Progress(job.config.steps, job.run_name, NODE)
    begin, prepare = partial(_begin, given), partial(_prepared, job, given)
    return progress.carry_out(job.config, settings, begin, prepare, (), job.checkpoint_every)


def _begin(given: Inputs, name: str, _: Reserve) -> tuple[Adapter, list[str]]:
    fused = given.fused()
    with torch.inference_mode(False), torch.no_grad():
        student, _, notes = training_layers.fitted(student_of(fused), given.model)
    return student.with_provenance(name=name), notes


@contextmanager
def _prepared(job: Job, given: Inputs, begun: Adapter, place: Place) -> Iterator[Prepared]:
    """The model with every concept's adapter on it, and the student in training."""
    guided = job.cfg > 1
    dropout = job.config.caption_dropout if guided else 0.0
    preserve, notes = without_concepts(job.preserve, given.adapters, given.prompts)
    shown, places = examples(given.prompts, preserve, job.samples, dropout)
    latents = _samples(job, given, shown, places)
    words = _Words(given, begun, shown)
    shape = (job.config.batch_size, *latents[0].shape)
    with training_model.ready(given.model, job.precision, shape) as ready, ExitStack() as undo:
        trees = training_layers.trees(ready.patcher)
        trained_parts = [part for part in begun.parts if part in trees]
        config = settled(replace(job.config, precision=ready.precision), begun, trained_parts)
        if not job.config.learning_rate:
            notes = [*notes, f"learning rate {config.learning_rate:.2g}, from the size of what was fused"]
        taught = [_fitted(given, adapter) for adapter in given.adapters]
        teachers = [training_layers.attached(undo, a, trees) for a in taught]
        learner = training_layers.attached(undo, begun, trees, ready.device)
        conditions = training_model.Conditions(ready.patcher, words.entries, latents)
        denoiser = training_model.Denoiser(ready, conditions)

        def predict(noisy: Tensor, timesteps: Tensor, rows: Sequence[int], as_teacher: bool) -> Tensor:
            return denoiser(noisy, timesteps, [words.place(shown[i], as_teacher) for i in rows])

        noise = ResidualNoise(ready.noise)
        setup = Setup(
            denoiser=DistilDenoiser(predict, learner, teachers, noise, shown),
            latents=[latents[number].to(ready.device) for number in places],
            order=Order(shown, config.batch_size, config.seed),
            diffusion=noise,
            attachments=learner,
            roots=[ready.root],
            recast=ready.streams.again,
            make_room=ready.make_room,
        )
        record = {"distilled": job.settings()}
        yield Prepared(begun, setup, config, "lora", record, notes=notes)


def _fitted(given: Inputs, adapter: Adapter) -> Adapter:
    """The adapter with the names that its layers have here; without any where it changes the text encoders
    alone. Raises SpectralAdapterError for an adapter of another model."""
    places = keys.place(adapter, given.model, given.clip)
    if places.clip and not places.model:
        return replace(adapter, layers={})
    return training_layers.fitted(adapter, given.model)[0]


def _samples(job: Job, given: Inputs, shown: Sequence[DistilExample], places: Sequence[int]) -> list[Tensor]:
    """Latents (C, H, W), as the model has them, of every sample: drawn with its concept's own adapter."""
    said = drawn_as(shown, places)
    empty = statistics.empty_latent(given.model, given.latent)
    bar = comfy.utils.ProgressBar(len(said) * job.sample_steps)
    way = drawing.Way(job.sample_steps, job.cfg)
    groups: dict[DistilExample, list[int]] = {}
    for number, example in said.items():
        groups.setdefault(example, []).append(number)
    found: dict[int, Tensor] = {}
    negative = statistics.encoded(given.clip, "") if job.cfg > 1 else None
    for concept in dict.fromkeys(example.concept for example in groups):
        model, clip = _with(given, concept)
        for example, numbers in groups.items():
            if example.concept != concept:
                continue
            positive = statistics.encoded(clip, example.prompt)
            seeds = [job.config.seed + number for number in numbers]
            drawn = drawing.draw(model, positive, negative, empty, seeds, way, bar.update)
            rows = [training_data.taken_in(given.model, row.float().cpu()) for row in drawn]
            found |= dict(zip(numbers, rows, strict=True))
    return [found[number] for number in range(len(found))]


def _with(given: Inputs, concept: int) -> tuple[Any, Any]:
    """MODEL and CLIP with the concept's adapter on them."""
    if concept == BASE:
        return given.model, given.clip
    applied = applying.apply(given.adapters[concept], given.model, given.clip, 1.0, 1.0)
    return applied.model, applied.clip


class _Words:
    """What the model is told of every example: by the CLIP with the concept's adapter, and with the
    student's. ``entries``: for :class:`..training.model.Conditions`, numbered below 0."""

    def __init__(self, given: Inputs, student: Adapter, shown: Sequence[DistilExample]) -> None:
        self.entries: dict[int | None, Any] = {}
        self._places: dict[tuple[int | None, str], int] = {}
        for concept in (None, *dict.fromkeys(e.concept for e in shown)):
            clip = given.clip
            if concept is None:
                clip = applying.apply(student, given.model, given.clip, 1.0, 1.0).clip
            elif concept != BASE:
                _, clip = _with(given, concept)
            for text in dict.fromkeys(e.prompt for e in shown if concept in (None, e.concept)):
                check_interrupt()
                place = -1 - len(self._places)
                self._places[concept, text] = place
                self.entries[place] = training_data.encode_caption(clip, text)

    def place(self, example: DistilExample, as_teacher: bool) -> int:
        return self._places[example.concept if as_teacher else None, example.prompt]
