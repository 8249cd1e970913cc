"""Train Adapter: a named run on the host's own model, resumed, returned when finished, never overwritten.

The run's folder ``output/spectral_adapters/.runs/<name>`` holds its checkpoints, events and
``start.safetensors``, the adapter that it began with; the finished adapter is
``output/spectral_adapters/<name>.safetensors``. This is the layout of the command ``train``.

Shapes: those of :mod:`.training_model`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import folder_paths
import torch

from ...spectral_core import safewrite
from ...spectral_core.adapter import Adapter
from ...spectral_core.attach import Attachment, attach
from ...spectral_core.errors import SpectralAdapterError
from ...spectral_core.fileformat import load, save
from ...spectral_core.fingerprint import fingerprint
from ...spectral_core.fusion import freeze
from ...spectral_core.training.config import TrainConfig
from ...spectral_core.training.events import FILE, read_events
from ...spectral_core.training.loop import Setup, TrainResult, train
from ...spectral_core.training.order import Order
from ...spectral_core.training.run import Place, Run, take_place
from . import paths, training_data, training_layers, training_model, training_start
from .training_data import Data, Pictures
from .training_job import Job
from .training_progress import Progress, check_interrupt
from .training_start import Origin

RUNS, STOPPED, RESULT = ".runs", "stopped.safetensors", "result.json"


@dataclass(frozen=True)
class Trained:
    """The adapter, its file, the losses of every step, what the user should know; ``reused``: the run was
    finished before and nothing was trained."""

    adapter: Adapter
    path: Path
    name: str
    losses: tuple[float, ...]
    seconds: float
    resumed_at: int
    notes: tuple[str, ...]
    reused: bool = False


@dataclass(frozen=True)
class Inputs:
    """What is connected: the MODEL, and LATENTs with CONDITIONINGs, or VAE and CLIP for a folder."""

    model: Any
    latents: Sequence[Any] = ()
    conditionings: Sequence[Any] = ()
    vae: Any = None
    clip: Any = None


def run(job: Job, given: Inputs) -> Trained:
    """Train the job, or go on with it, or return what it has made.

    Raises SpectralAdapterError before the first step for everything that can be known then, the host's
    interrupt where the user stops it (the checkpoint is kept), and whatever else ends a training. The MODEL
    is afterwards as it was.
    """
    with torch.inference_mode(False), torch.no_grad():
        shown = _source(job, given)
        start, weights, notes = training_start.layers(job, given.model)
        base = fingerprint(weights)
    settings = _settings(job, given, shown, base)
    folder = Path(folder_paths.get_output_directory(), paths.KEY)
    place = take_place(folder / RUNS, job.run_name, settings)
    path, made = _result(folder, place)
    if place.state == "finished" and made and path.is_file():
        with torch.inference_mode(False):
            return Trained(load(path), path, place.name, _losses(place), 0.0, place.step, (), reused=True)
    if place.earlier:
        notes.append(f"run {place.earlier[0]} has other settings: this one is {place.name}")
    with ExitStack() as around:
        with torch.inference_mode(False), torch.no_grad():
            origin = Origin(given.model, start, weights, base, folder)
            begun, more = training_start.begin(around, job, origin, place, path)
        data = _data(shown, given)
        return _train(job, given.model, data, begun, place, path, settings, [*notes, *more, *data.notes])


# --- before the run is known ----------------------------------------------------------------------------


def _source(job: Job, given: Inputs) -> Data | Pictures:
    """The data as far as it must be known to tell one run from another."""
    if job.images and (given.latents or given.conditionings):
        raise SpectralAdapterError(
            "images and latents are both given: choose 'none' as images, or disconnect latents and "
            "conditioning"
        )
    if job.images:
        missing = [name for name in ("vae", "clip") if getattr(given, name) is None]
        if missing:
            raise SpectralAdapterError(
                f"images {job.images!r}: {' and '.join(missing)} not connected; a folder of pictures needs "
                "the model's VAE and CLIP"
            )
        step = _pixels_per_cell(given.vae)
        return training_data.look_at(job.images, job.trigger_word, job.resolution, job.keep_proportions, step)
    if not given.latents or not given.conditionings:
        raise SpectralAdapterError(
            "nothing to train on: choose a folder as images (with vae and clip connected), or connect "
            "latents and conditioning"
        )
    return training_data.from_nodes(given.model, given.latents, given.conditionings, given.clip)


def _pixels_per_cell(vae: Any) -> int:
    ratio = getattr(vae, "downscale_ratio", 8)
    return ratio if isinstance(ratio, int) else 8


def _settings(job: Job, given: Inputs, shown: Data | Pictures, base: Mapping[str, Any]) -> dict[str, Any]:
    """What the result depends on; compared when a run of this name is there already."""
    model = hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()[:16]
    found = {"config": job.config.as_dict(), "job": job.settings(), "pictures": shown.digest, "model": model}
    if job.images:
        found["vae"] = training_data.digest_of_weights(given.vae.patcher)
    if given.clip is not None:
        found["clip"] = training_data.digest_of_weights(given.clip.patcher)
    return found


def _result(folder: Path, place: Place) -> tuple[Path, bool]:
    """The file of the finished adapter, and whether this run has made it before; somebody else's file is
    left alone."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((place.folder / RESULT).read_text(encoding="utf-8"))
        return folder / Path(record["file"]).name, True
    path = folder / f"{place.name}.safetensors"
    return (safewrite.free_name(path) if path.exists() else path), False


def _losses(place: Place) -> tuple[float, ...]:
    events = place.folder / FILE
    if not events.is_file():
        return ()
    steps = [e for e in read_events(events) if e["event"] == "step" and e.get("loss") is not None]
    return tuple(float(e["loss"]) for e in steps)


# --- the run --------------------------------------------------------------------------------------------


def _data(shown: Data | Pictures, given: Inputs) -> Data:
    if isinstance(shown, Data):
        return shown
    return training_data.from_pictures(given.model, shown, given.vae, given.clip, check_interrupt)


def _train(
    job: Job,
    model: Any,
    data: Data,
    begun: Adapter,
    place: Place,
    path: Path,
    settings: Mapping[str, Any],
    notes: list[str],
) -> Trained:
    progress = Progress(place.name, job.config.steps)
    shape = (job.config.batch_size, *data.latents[0].shape)
    with training_model.ready(model, job.precision, shape) as ready:
        config, more = _config(job, data, ready.precision)
        notes += more
        for note in notes:
            progress({"event": "warning", "step": 0, "text": note})
        conditions = training_model.Conditions(ready.patcher, data.entries, data.latents)
        with ExitStack() as undo:
            is_new = job.continued is None  # another adapter may have layers that this model has not
            trees = training_layers.trees(ready.patcher)
            attachments = [
                undo.enter_context(attach(trees[part], begun, part, trainable=True, strict=is_new))
                for part in begun.parts
                if part in trees
            ]
            setup = _setup(config, data, ready, conditions, attachments)
            around = Run(
                folder=place.folder,
                checkpoint_every=job.checkpoint_every,
                listener=progress,
                cancel=progress.cancel,
                settings={k: v for k, v in settings.items() if k != "config"},
            )
            result = train(setup, config, job.method, run=around)
            adapter = _learned(begun, attachments, job, config, data, result)
        return _saved(adapter, result, place, path, progress, config, notes)


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
    ready: training_model.Ready,
    conditions: training_model.Conditions,
    attachments: Sequence[Attachment],
) -> Setup:
    device = ready.device
    masks = None if data.masks is None else [None if m is None else m.to(device) for m in data.masks]
    return Setup(
        denoiser=training_model.Denoiser(ready, conditions),
        latents=[latent.to(device) for latent in data.latents],
        order=Order(data.repeats, config.batch_size, config.seed, data.groups),
        diffusion=ready.noise,
        attachments=attachments,
        masks=masks,
        roots=[ready.root],
    )


def _learned(
    begun: Adapter,
    attachments: Sequence[Attachment],
    job: Job,
    config: TrainConfig,
    data: Data,
    result: TrainResult,
) -> Adapter:
    """The adapter as it is now, with what it was trained with."""
    layers = dict(begun.layers)
    for attachment in attachments:
        now = attachment.to_adapter().layers
        layers |= {name: now[name] for name, _ in attachment.modules()}
    record = {
        **job.settings(),
        **config.as_dict(),
        "learning_rate": config.rate_for(job.method),
        "optimizer": config.optimiser,  # the words under which other programs show them
        "images": len(data.latents),
        "steps_done": len(result.losses),
    }
    trained = replace(begun, layers=layers)
    trained = trained.with_provenance(training={k: v for k, v in record.items() if v is not None})
    return freeze(trained) if config.freeze_gates and not result.stopped else trained


def _saved(
    adapter: Adapter,
    result: TrainResult,
    place: Place,
    path: Path,
    progress: Progress,
    config: TrainConfig,
    notes: Sequence[str],
) -> Trained:
    """The finished adapter in its file; the host's interrupt for a stopped one, which is kept in the run's
    folder."""
    if result.stopped:
        save(adapter, place.folder / STOPPED, overwrite=True)
        progress.stop(
            f"Train Adapter, {place.name}: stopped at step {len(result.losses)} of {config.steps}; a "
            "checkpoint is kept: queue the same settings again to go on from there"
        )
    save(adapter, path, overwrite=True)
    record = {"file": path.name, "steps": config.steps, "content": adapter.content_hash}
    (place.folder / RESULT).write_text(json.dumps(record), encoding="utf-8")
    if progress.cancel():
        progress.stop(f"Train Adapter, {place.name}: finished; the workflow is stopped as asked")
    said = tuple(dict.fromkeys((*notes, *result.notes)))
    return Trained(adapter, path, place.name, tuple(result.losses), result.seconds, result.resumed_at, said)
