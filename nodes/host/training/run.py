"""A run of Train Adapter once its place is known: the model made ready, the training, the finished file.

Shapes: those of :mod:`.model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.attach.attaching import Attachment, attach
from ....spectral_core.files.adapter_file import save
from ....spectral_core.fusion import freeze
from ....spectral_core.training.config.config import TrainConfig
from ....spectral_core.training.data.order import Order
from ....spectral_core.training.engine.loop import Setup, train
from ....spectral_core.training.runs.finished import Result, save_best, save_result, save_stopped
from ....spectral_core.training.runs.memory_errors import explained, is_out_of_memory
from ....spectral_core.training.runs.outcome import TrainResult
from ....spectral_core.training.runs.place import Place, Run
from ..files import paths
from . import data as training_data
from . import layers as training_layers
from . import model as training_model
from . import text as training_text
from .data import Data
from .job import Job
from .progress import Progress
from .samples import Sampler

CHECKPOINTING = "checkpointing"  # the widget that saves memory


@dataclass(frozen=True)
class Trained:
    """The adapter, its file, the losses of every step, what the user should know; ``reused``: the run was
    finished before and nothing was trained; ``held_out``: step -> loss on the held-out pictures."""

    adapter: Adapter
    path: Path
    name: str
    losses: tuple[float, ...]
    seconds: float
    resumed_at: int
    notes: tuple[str, ...]
    reused: bool = False
    held_out: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """What is connected: the MODEL, and LATENTs with CONDITIONINGs, or VAE and CLIP for a folder."""

    model: Any
    latents: Sequence[Any] = ()
    conditionings: Sequence[Any] = ()
    vae: Any = None
    clip: Any = None


@dataclass(frozen=True)
class At:
    """Where a run is kept: its folder, the finished adapter's file, its settings; what was odd so far."""

    place: Place
    expected: Result
    settings: Mapping[str, Any]
    notes: list[str]


def carry_out(
    job: Job,
    given: Inputs,
    data: Data,
    begun: Adapter,
    words: Mapping[str, Mapping[str, torch.Tensor]],
    at: At,
) -> Trained:
    """Train from the adapter ``begun`` and the words' first rows; as :func:`.named_run.run`."""
    progress = Progress(at.place.name, job.config.steps, asked=job.run_name)
    shown = training_data.add_sample(data, job.sample_prompt, job.trigger_word, given.clip)
    shape = (job.config.batch_size, *data.latents[0].shape)
    with training_model.ready(given.model, job.precision, shape, job.offload) as ready, ExitStack() as undo:
        config, more = _config(job, data, ready.precision)
        notes = [*at.notes, *more]
        for note in notes:
            progress({"event": "warning", "step": 0, "text": note})
        text = None
        if job.trains_text:
            text = undo.enter_context(training_text.ready(given.clip, words, ready.patcher))
        attachments = _attached(undo, job, begun, ready, text)
        denoiser = training_model.Denoiser(ready, _conditions(ready, text, data))
        setup = _setup(config, data, denoiser, attachments, text)
        sampler = Sampler(
            denoiser, attachments, shape[1:], config.seed, shown, data.can_drop, given.vae, progress.cancel
        )
        around = Run(
            folder=at.place.folder,
            checkpoint_every=job.checkpoint_every,
            sample_every=job.sample_every,
            sampler=sampler,
            listener=progress,
            cancel=progress.cancel,
            settings={k: v for k, v in at.settings.items() if k != "config"},
        )

        def learned(steps: int) -> Adapter:
            return _learned(begun, attachments, text, job, config, data, steps)

        progress.keeps(at.place.folder, lambda steps: keep(learned(steps), at.place.name, steps))
        result = train_explained(setup, config, job.method, around, at.place)
        adapter = learned(len(result.losses))
        if result.gates is not None:
            told = {**adapter.provenance.training, **result.gates.record()}
            adapter = adapter.with_provenance(training=told)
        if not result.stopped:
            adapter = _frozen(adapter, config)
        best = save_best(lambda steps: _frozen(learned(steps), config), result, at.expected)
    return saved(adapter, result, at, progress, config, notes, best)


def _frozen(adapter: Adapter, config: TrainConfig) -> Adapter:
    """With fixed gates, where that is asked for."""
    return freeze(adapter) if config.freeze_gates else adapter


def train_explained(setup: Setup, config: TrainConfig, method: str, around: Run, place: Place) -> TrainResult:
    """Train; where the memory does not suffice, with an error that says what to do about it."""
    try:
        return train(setup, config, method, run=around)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise _same_kind(error, f"run {place.name}: {explained(place.folder, CHECKPOINTING)}") from error


def _same_kind(error: BaseException, text: str) -> Exception:
    """Out of memory as the host knows it, which then makes room, with our words."""
    return torch.cuda.OutOfMemoryError(text) if isinstance(error, RuntimeError) else MemoryError(text)


def _attached(
    undo: ExitStack, job: Job, begun: Adapter, ready: training_model.Ready, text: training_text.Text | None
) -> list[Attachment]:
    """The adapter in training on every part that it changes here."""
    trees = training_layers.trees(ready.patcher)
    if text is not None:
        trees |= training_text.trees(text.patcher.model)
    is_new = job.continued is None  # another adapter may have layers that this model has not
    return [
        undo.enter_context(attach(trees[part], begun, part, True, is_new, ready.device))
        for part in begun.parts
        if part in trees
    ]


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


def _learned(
    begun: Adapter,
    attachments: Sequence[Attachment],
    text: training_text.Text | None,
    job: Job,
    config: TrainConfig,
    data: Data,
    steps: int,
) -> Adapter:
    """The adapter as it is now, after ``steps`` steps, with what it was trained with."""
    layers = dict(begun.layers)
    for attachment in attachments:
        now = attachment.to_adapter().layers
        layers |= {name: now[name] for name, _ in attachment.modules()}
    record = {
        **job.settings(),
        **config.as_dict(),
        "learning_rate": config.rate_for(job.method),
        "optimizer": config.optimiser,  # the words under which other programs show them
        "images": data.concept_count,
        "steps_done": steps,
    }
    words = {} if text is None else text.values()
    trained = replace(begun, layers=layers, tokens={**begun.tokens, **words})
    return trained.with_provenance(training={k: v for k, v in record.items() if v is not None})


def keep(adapter: Adapter, name: str, steps: int) -> Path:
    """An adapter out of a training that goes on, where the loaders list it."""
    path = paths.unfinished_file(name, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        return save(adapter, path, overwrite=True)


def saved(
    adapter: Adapter,
    result: TrainResult,
    at: At,
    progress: Progress,
    config: TrainConfig,
    notes: Sequence[str],
    best: Path | None = None,
) -> Trained:
    """The finished adapter in its file; the host's interrupt for a stopped one, which is kept in the run's
    folder."""
    place = at.place
    if result.stopped:
        save_stopped(adapter, place)
        progress.stop(
            f"stopped at step {len(result.losses)} of {config.steps}; a checkpoint is kept: queue the same "
            "settings again to go on from there"
        )
    path = save_result(adapter, at.expected, place, config.steps, best)
    if progress.cancel():
        progress.stop("finished; the workflow is stopped as asked")
    said = tuple(dict.fromkeys((*notes, *result.notes)))
    losses = tuple(result.losses)
    return Trained(
        adapter, path, place.name, losses, result.seconds, result.resumed_at, said, held_out=result.held_out
    )
