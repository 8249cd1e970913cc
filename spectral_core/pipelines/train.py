"""Train an adapter on a diffusers pipeline as a named run: resumed, returned when finished, never
overwritten.

    job, output = Job("pictures/vase", "<vase>"), Output(Path("adapters"), "vase")
    done = train_adapter(pipe, job, TrainConfig(), output)

The run's folder ``<adapters>/.runs/<name>`` holds its checkpoints, events, samples and ``start.safetensors``,
the adapter that it began with: its singular columns are never looked for twice. The finished adapter is
``<adapters>/<name>.safetensors``. The pipeline is afterwards as it was.

Shapes: :mod:`.dataset`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..adapter.adapter import Adapter, Provenance, create
from ..adapter.fingerprint import fingerprint
from ..attach.attaching import Attachment, attach
from ..attach.targets import find_targets
from ..errors import SpectralAdapterError
from ..files.adapter_file import load, save
from ..fusion import freeze
from ..maths.svd_cache import SVDCache, default_cache_folder
from ..training.config.adapter import RunSettings
from ..training.config.config import TrainConfig
from ..training.config.setting import check_settings
from ..training.data.folder import Order
from ..training.engine.checks import fitting
from ..training.engine.columns import reserve
from ..training.engine.loop import Setup, train
from ..training.runs import distributed
from ..training.runs.events import Listener
from ..training.runs.finished import find_result, save_best, save_result, save_stopped
from ..training.runs.memory_errors import explained, is_out_of_memory
from ..training.runs.outcome import TrainResult
from ..training.runs.place import Place, Run, take_place
from .applying import generate
from .concept import basis_source, diffusion_of
from .dataset import Captions, Dataset, encode_dataset, find_dataset, latent_factor, masks_of
from .job import Job
from .loading import family_of, parts_of
from .tokens import TokenRows, initial_rows

RUNS = ".runs"
START = "start.safetensors"


@dataclass(frozen=True)
class Output(RunSettings):
    """Where a run is kept, and how often: adapters folder, run name, steps between checkpoints and samples.

    extend: a finished run with the same settings and fewer steps goes on. listener, cancel: see
    :class:`..training.runs.place.Run`. cache_folder: of singular columns, latents and captions.
    """

    adapters: Path
    name: str
    extend: bool = False
    listener: Listener | None = None
    cancel: Callable[[], bool] | None = None
    cache_folder: Path | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def caches(self) -> Path:
        return self.cache_folder or default_cache_folder()


@dataclass(frozen=True)
class Trained:
    """The adapter and its file (of a stopped run: what it had learned, in the run's folder), the run, and
    whether it was finished before (``reused``: nothing was trained)."""

    adapter: Adapter
    path: Path
    result: TrainResult
    place: Place
    reused: bool
    notes: tuple[str, ...]


def train_adapter(pipe: Any, job: Job, config: TrainConfig, output: Output) -> Trained:
    """Train the job on the pipeline, or go on with it, or return what it has made.

    Raises SpectralAdapterError before the first step for everything that can be known then, and as
    :func:`..training.engine.loop.train` later; out of memory is one, too.
    """
    data = find_dataset(pipe, job)
    weights, notes = target_weights(pipe, job)
    settings = _settings(job, config, data, fingerprint(weights))
    place = _same_place(output, settings)
    expected = find_result(place, output.adapters)
    path = expected.path
    if place.state == "finished" and expected.is_there:
        return Trained(load(path), path, TrainResult(resumed_at=place.step), place, True, tuple(data.notes))
    if place.earlier:
        notes.append(f"run {place.earlier[0]} has other settings: this one is {place.name}")
    with ExitStack() as around:
        adapter, more = _start(around, pipe, job, config, output, place, path, weights)
        notes = [*data.notes, *notes, *more]
        result, trained, best = _train(pipe, job, config, output, place, adapter, data, settings, notes)
        if distributed.world().is_main:
            if result.stopped:
                path = save_stopped(trained, place)
            else:
                path = save_result(trained, expected, place, config.steps, best)
    return Trained(trained, path, result, place, False, tuple(dict.fromkeys((*notes, *result.notes))))


def target_weights(pipe: Any, job: Job) -> tuple[dict[str, Tensor], list[str]]:
    """Layer name -> weight of every layer that the job trains, and what to say about layers too small for
    it."""
    parts = parts_of(pipe)
    weights, _ = find_targets(parts["unet"], "unet", job.targets)
    for part in ("text_encoder", "text_encoder_2"):
        if job.text_targets and part in parts:
            weights |= find_targets(parts[part], part, job.text_targets)[0]
    return fitting(weights, job.method_config(job.columns or tuple(range(job.rank))))


def _settings(job: Job, config: TrainConfig, data: Dataset, base: Mapping[str, Any]) -> dict[str, Any]:
    """What the result depends on, JSON-able; compared when a run of this name is there already."""
    model = hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()[:16]
    return {"config": config.as_dict(), "job": job.settings(), "pictures": data.digest, "model": model}


def _same_place(output: Output, settings: Mapping[str, Any]) -> Place:
    """The run's folder; one process chooses it for all."""
    world = distributed.world()
    found = [
        take_place(output.adapters / RUNS, output.name, settings, output.extend) if world.is_main else None
    ]
    if world.size > 1:
        torch.distributed.broadcast_object_list(found, 0)
    assert found[0] is not None
    return found[0]


def _start(
    around: ExitStack,
    pipe: Any,
    job: Job,
    config: TrainConfig,
    output: Output,
    place: Place,
    result: Path,
    weights: Mapping[str, Tensor],
) -> tuple[Adapter, list[str]]:
    """The adapter that the run begins with: made once, with its columns reserved while it trains."""
    path, base = place.folder / START, fingerprint(weights)
    world = distributed.world()
    if path.is_file():
        adapter = load(path)
        columns = adapter_columns(adapter)
        if world.is_main and columns:
            held = around.enter_context(reserve(output.adapters, base, columns, place.name))
            return adapter, [note for note in held.notes if f"taken by {result.name}" not in note]
        return adapter, []
    notes: list[str] = []
    if world.is_main:
        chosen = job.columns
        if job.needs_columns:
            held = around.enter_context(reserve(output.adapters, base, job.columns or job.rank, place.name))
            chosen, notes = held.columns, list(held.notes)
        method = job.method_config(chosen or tuple(range(job.rank)))
        kept, more = fitting(weights, method)
        adapter = create(
            kept,
            method,
            basis_source(method, SVDCache(output.caches)),
            torch.Generator().manual_seed(config.seed),
            Provenance(name=place.name, family=family_of(pipe), base=base, trigger_words=(job.token,)),
        )
        save(adapter, path)
        notes += more
    if world.size > 1:
        torch.distributed.barrier()
        adapter = load(path)
    return adapter, notes


def adapter_columns(adapter: Adapter) -> tuple[int, ...]:
    """The singular columns that an adapter uses in any layer."""
    found = (t.config.singular_columns for layer in adapter.layers.values() for t in layer.terms)
    return tuple(sorted({c for columns in found for c in columns}))


def _train(
    pipe: Any,
    job: Job,
    config: TrainConfig,
    output: Output,
    place: Place,
    adapter: Adapter,
    data: Dataset,
    settings: Mapping[str, Any],
    notes: Sequence[str],
) -> tuple[TrainResult, Adapter, Path | None]:
    """The run, the adapter, and the file of its best state where that is another."""
    cache = output.caches if job.cache else None
    with _attached(pipe, job, adapter) as (attachments, words):
        setup = _setup(pipe, job, config, data, cache, attachments, words)
        run = Run(
            folder=place.folder,
            checkpoint_every=output.checkpoint_every,
            sample_every=output.sample_every,
            sampler=_sampler(pipe, job) if output.sample_every else None,
            listener=output.listener,
            cancel=output.cancel,
            settings={k: v for k, v in settings.items() if k != "config"},
        )
        if output.listener is not None:
            for note in notes:
                output.listener({"event": "warning", "step": 0, "text": note})
        try:
            result = train(setup, config, job.method, run=run)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise SpectralAdapterError(f"run {place.name}: {explained(place.folder)}") from error

        def learned(steps: int) -> Adapter:
            layers = {n: v for a in attachments for n, v in _learned(a).items()}
            now = replace(adapter, layers={**adapter.layers, **layers}, tokens=words.values())
            record = {
                **job.settings(),
                **config.as_dict(),
                "learning_rate": config.rate_for(job.method),
                "optimizer": config.optimiser,  # the words under which other programs show them
                "resolution": f"{job.size[0]}x{job.size[1]}",
                "images": data.concept_count,
                "steps_done": steps,
            }
            return now.with_provenance(training={k: v for k, v in record.items() if v is not None})

        trained = learned(len(result.losses))
        if result.gates is not None:
            trained = trained.with_provenance(
                training={**trained.provenance.training, **result.gates.record()}
            )
        best = None
        if distributed.world().is_main:
            best = save_best(
                lambda steps: _frozen(learned(steps), config),
                result,
                find_result(place, output.adapters),
            )
    return result, trained if result.stopped else _frozen(trained, config), best


def _frozen(adapter: Adapter, config: TrainConfig) -> Adapter:
    """With fixed gates, where that is asked for."""
    return freeze(adapter) if config.freeze_gates else adapter


def _learned(attachment: Attachment) -> dict[str, Any]:
    """The layers that an attachment trained."""
    layers = attachment.to_adapter().layers
    return {name: layers[name] for name, _ in attachment.modules()}


@contextmanager
def _attached(pipe: Any, job: Job, adapter: Adapter) -> Iterator[tuple[list[Attachment], TokenRows]]:
    """The adapter in training on every part that it changes, and the new words."""
    with ExitStack() as undo:
        new = {job.token: initial_rows(pipe, job.init_words)} if job.init_words else {}
        words = TokenRows(pipe, new, trainable=True)
        undo.callback(words.remove)
        modules = parts_of(pipe)
        attachments = [
            undo.enter_context(attach(modules[part], adapter, part=part, trainable=True))
            for part in adapter.parts
        ]
        yield attachments, words


def _setup(
    pipe: Any,
    job: Job,
    config: TrainConfig,
    data: Dataset,
    cache: Path | None,
    attachments: Sequence[Attachment],
    words: TokenRows,
) -> Setup:
    latents = encode_dataset(pipe, data, cache)
    prior = None
    if job.prior_images:
        prior = Order(data.shown(prior=True), config.batch_size, config.seed + 1, data.sizes)
    captions = Captions(pipe, keep=not (job.init_words or job.text_targets), cache=cache)
    modules = parts_of(pipe)
    return Setup(
        denoiser=denoiser_of(pipe, data, captions),
        latents=latents,
        order=Order(data.shown(prior=False), config.batch_size, config.seed, data.sizes),
        diffusion=diffusion_of(pipe),
        attachments=attachments,
        tokens=[p for rows in words.parameters.values() for p in rows.values()],
        masks=masks_of(data, latents),
        prior=prior,
        roots=[modules["unet"]],
        held_out=data.held_out,
        preserved=data.preserved,
    )


def denoiser_of(
    pipe: Any, data: Dataset, captions: Captions
) -> Callable[[Tensor, Tensor, Sequence[int | None]], Tensor]:
    """The pipeline's denoiser as a callable of (noisy, timesteps, examples); None is an empty caption."""
    factor = latent_factor(pipe)

    def denoise(noisy: Tensor, timesteps: Tensor, indices: Sequence[int | None]) -> Tensor:
        texts = [data.caption(i) for i in indices]
        size = (noisy.shape[-1] * factor, noisy.shape[-2] * factor)
        conditioning = captions.encode(texts, size)
        prediction: Tensor = pipe.unet(noisy.to(pipe.unet.dtype), timesteps, **conditioning).sample
        return prediction

    return denoise


def _sampler(pipe: Any, job: Job) -> Callable[[int], Sequence[Image.Image]]:
    """The same prompts and seeds every time."""
    prompts = job.sample_prompts or (f"a picture of {job.token}",)

    def draw(step: int) -> Sequence[Image.Image]:
        return generate(pipe, prompts, list(range(len(prompts))), size=job.size, batch_size=1)

    return draw
