"""What Train Adapter trains: the model made ready, with the adapter and the data on it.

Shapes: those of :mod:`.model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.attach.attaching import Attachment
from ....spectral_core.training.config.config import TrainConfig
from ....spectral_core.training.data.order import Order
from ....spectral_core.training.engine.loop import Setup
from ....spectral_core.training.engine.named_run import Prepared
from ....spectral_core.training.runs.place import Place
from . import data as training_data
from . import layers as training_layers
from . import model as training_model
from . import text as training_text
from .data import Data
from .job import Job
from .samples import Sampler


@dataclass(frozen=True)
class Inputs:
    """What is connected: the MODEL, and LATENTs with CONDITIONINGs, or VAE and CLIP for a folder."""

    model: Any
    latents: Sequence[Any] = ()
    conditionings: Sequence[Any] = ()
    vae: Any = None
    clip: Any = None


@contextmanager
def prepared(
    job: Job,
    given: Inputs,
    words: Mapping[str, Mapping[str, torch.Tensor]],
    read: Callable[[], Data],
    stop: Callable[[], bool],
    begun: Adapter,
    place: Place,
) -> Iterator[Prepared]:
    """The model with the adapter ``begun`` and the words' first rows in training on it. read: gives the data.
    stop: asked while samples are drawn."""
    data = read()
    sample = training_data.add_sample(data, job.sample_prompt, job.trigger_word, given.clip)
    shape = (job.config.batch_size, *data.latents[0].shape)
    with training_model.ready(given.model, job.precision, shape, job.offload) as ready, ExitStack() as undo:
        config, notes = _config(job, data, ready.precision)
        text = None
        if job.trains_text:
            text = undo.enter_context(training_text.ready(given.clip, words, ready.patcher))
        trees = training_layers.trees(ready.patcher)
        if text is not None:
            trees |= training_text.trees(text.patcher.model)
        is_new = job.continued is None  # another adapter may have layers that this model has not
        attachments = training_layers.attached(undo, begun, trees, ready.device, strict=is_new)
        denoiser = training_model.Denoiser(ready, _conditions(ready, text, data))
        yield Prepared(
            begun,
            _setup(config, data, denoiser, attachments, text),
            config,
            job.method,
            record={**job.settings(), "images": data.concept_count},
            finish=lambda adapter: _with_words(adapter, text),
            sampler=Sampler(
                denoiser, attachments, shape[1:], config.seed, sample, data.can_drop, given.vae, stop
            ),
            notes=[*data.notes, *notes],
        )


def _with_words(adapter: Adapter, text: training_text.Text | None) -> Adapter:
    return adapter if text is None else replace(adapter, tokens={**adapter.tokens, **text.values()})


def _conditions(
    ready: training_model.Ready, text: training_text.Text | None, data: Data
) -> training_model.HasRows:
    if text is not None:
        return training_text.Conditions(ready.patcher, text, data.captions)
    return training_model.Conditions(ready.patcher, data.entries, data.latents)


def _config(job: Job, data: Data, precision: str) -> tuple[TrainConfig, list[str]]:
    """The settings with what the model and the data decide."""
    config = replace(job.config, precision=precision)
    if config.caption_dropout and not data.can_drop:
        return replace(config, caption_dropout=0.0), [
            "no captions are dropped: that needs the CLIP, connected to clip"
        ]
    return config, []


def _setup(
    config: TrainConfig,
    data: Data,
    denoiser: training_model.Denoiser,
    attachments: Sequence[Attachment],
    text: training_text.Text | None,
) -> Setup:
    device = denoiser.ready.device
    masks = None if data.masks is None else [None if m is None else m.to(device) for m in data.masks]
    prior = None
    if data.prior_from is not None:
        prior = Order(data.shown(prior=True), config.batch_size, config.seed + 1, data.groups)
    return Setup(
        denoiser=denoiser,
        latents=[latent.to(device) for latent in data.latents],
        order=Order(data.shown(prior=False), config.batch_size, config.seed, data.groups),
        diffusion=denoiser.ready.noise,
        attachments=attachments,
        tokens=[] if text is None else text.parameters,
        masks=masks,
        prior=prior,
        held_out=data.held_out,
        preserved=data.preserved,
        recast=denoiser.ready.streams.again,
        make_room=denoiser.ready.make_room,
        roots=[denoiser.ready.root, *(training_text.trees(text.patcher.model).values() if text else ())],
    )
