"""A named run: trained, gone on with where it stopped, or returned where it is finished; never overwritten.

Every training is one. What differs is handed in: the settings by which a run is known again, ``begin``, which
makes the adapter that a new run begins with, and ``prepare``, in which the model is ready to train.

The run's folder ``<adapters>/.runs/<name>`` holds ``run.json`` (the settings), ``start.safetensors`` (what
``begin`` made: singular columns are never looked for twice), checkpoints, events, samples and
``result.json``. The finished adapter is ``<adapters>/<name>.safetensors``.

Shapes: :mod:`..objectives.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapter.adapter import Adapter, Provenance, create
from ...errors import SpectralAdapterError
from ...files.adapter_file import load, save
from ...files.cover import copy_picture
from ...fusion import freeze
from ...maths.svd_cache import default_cache_folder
from ...methods import Basis, MethodConfig
from ...words import OneLine
from ..config.adapter import AdapterSettings, RunSettings
from ..config.config import TrainConfig
from ..config.setting import check_settings
from ..objectives.losses import Setup
from ..runs import distributed
from ..runs.events import Listener
from ..runs.finished import find_result, past, save_best, save_result, save_stopped
from ..runs.memory_errors import explained, is_out_of_memory
from ..runs.outcome import TrainResult
from ..runs.place import Place, Run, Sampler, make, take_place
from .checks import fitting
from .columns import Reservation, reserve
from .loop import train

RUNS = ".runs"
START = "start.safetensors"

Reserve = Callable[[Mapping[str, Any], int | Sequence[int]], Reservation]
"""(base, how many columns or which) -> columns that are held until the run ends."""
Begin = Callable[[str, Reserve], tuple[Adapter, list[str]]]
"""(the run's name, …) -> the adapter to begin with, and what to say about it."""


@dataclass(frozen=True)
class Output(RunSettings):
    """Where a run is kept, and how often: adapters folder, run name, steps between checkpoints and samples.

    extend: a finished run with the same settings and fewer steps goes on. listener, cancel: see
    :class:`..runs.place.Run`. cache_folder: of singular columns, latents and captions. runs: the folder of
    the runs' own folders, by default ``.runs`` below the adapters.
    """

    adapters: Path
    name: str
    extend: bool = False
    listener: Listener | None = None
    cancel: Callable[[], bool] | None = None
    cache_folder: Path | None = None
    runs: Path | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def caches(self) -> Path:
        return self.cache_folder or default_cache_folder()

    def asked(self) -> None:
        """While another program is waited for: KeyboardInterrupt where ``cancel`` says so."""
        if self.cancel is not None and self.cancel():
            raise KeyboardInterrupt


def _unchanged(adapter: Adapter) -> Adapter:
    return adapter


@dataclass(frozen=True)
class Prepared:
    """A run before its first step: ``begun`` in training on the model, as the set-up has it.

    config: the settings with what the model and the data decide. record: what else the file says of the
    training. finish: what becomes of an adapter besides its layers. notes: what the user should know.
    """

    begun: Adapter
    setup: Setup
    config: TrainConfig
    method: str
    record: Mapping[str, Any]
    finish: Callable[[Adapter], Adapter] = _unchanged
    sampler: Sampler | None = None
    notes: Sequence[str] = ()

    def adapter(self, steps: int) -> Adapter:
        """What has been learned after ``steps`` steps."""
        layers = dict(self.begun.layers)
        for attachment in self.setup.attachments:
            now = attachment.to_adapter().layers
            layers |= {name: now[name] for name, _ in attachment.modules()}
        record = {
            **self.begun.provenance.training,
            **self.record,
            **self.config.as_dict(),
            "learning_rate": self.config.rate_for(self.method),
            "optimizer": self.config.optimiser,  # the words under which other programs show them
            "steps_done": steps,
        }
        told = {name: value for name, value in record.items() if value is not None}
        return self.finish(replace(self.begun, layers=layers)).with_provenance(training=told)

    def frozen(self, adapter: Adapter) -> Adapter:
        """With fixed gates, where that is asked for."""
        return freeze(adapter) if self.config.freeze_gates else adapter


Prepare = Callable[[Adapter, Place], AbstractContextManager[Prepared]]
"""(what the run began with, its folder) -> the model ready to train; afterwards it is as it was."""


@dataclass(frozen=True, repr=False)
class Trained(OneLine):
    """The adapter and its file (of a stopped run: what it had learned, in the run's folder), the run, and
    whether it was finished before (``reused``: nothing was trained)."""

    adapter: Adapter
    path: Path
    result: TrainResult
    place: Place
    reused: bool
    notes: tuple[str, ...]


def named_run(
    output: Output,
    config: TrainConfig,
    settings: Mapping[str, Any],
    begin: Begin,
    prepare: Prepare,
    notes: Sequence[str] = (),
) -> Trained:
    """Train, or go on, or return what the run has made.

    config: as it was asked for. settings: what else the result depends on, JSON-able; with other ones the
    run is ``name-2``. notes: told with those of the run.

    Raises SpectralAdapterError as :func:`.loop.train`, and where memory runs out, KeyboardInterrupt where it
    is cancelled before its first step, while it waits for another program; whatever ``begin`` and
    ``prepare`` raise passes on.
    """
    make(output.adapters, "folder of the adapters")
    place = _same_place(output, {"config": config.as_dict(), **settings})
    expected = find_result(place, output.adapters)
    path = expected.path
    if place.state == "finished" and expected.is_there:
        with torch.inference_mode(False):
            return Trained(load(path), path, past(place), place, True, tuple(notes))
    said = list(notes)
    if place.earlier:
        said.append(f"run {place.earlier[0]} has other settings: this one is {place.name}")
    best = None
    with ExitStack() as around:
        begun, more = _begun(around, output, place, path.name, begin)
        with prepare(begun, place) as ready:
            said += [*more, *ready.notes]
            result = _train(output, place, ready, said)
            trained = ready.adapter(len(result.losses))
            if result.gates is not None:
                told = {**trained.provenance.training, **result.gates.record()}
                trained = trained.with_provenance(training=told)
            if not result.stopped:
                trained = ready.frozen(trained)
            if distributed.world().is_main:
                best = save_best(lambda steps: ready.frozen(ready.adapter(steps)), result, expected)
        if distributed.world().is_main:
            if result.stopped:
                path = save_stopped(trained, place)
            else:
                path = save_result(trained, expected, place, config.steps, best)
                _add_cover(place, path)
    return Trained(trained, path, result, place, False, tuple(dict.fromkeys((*said, *result.notes))))


def _add_cover(place: Place, path: Path) -> None:
    """The first of the last samples becomes the file's cover."""
    samples = sorted((place.folder / "samples").glob("step-*-0.png"))
    if samples:
        copy_picture(samples[-1], path)


def _same_place(output: Output, settings: Mapping[str, Any]) -> Place:
    """The run's folder; one process chooses it for all."""
    world = distributed.world()
    found = [
        take_place(output.runs or output.adapters / RUNS, output.name, settings, output.extend, output.asked)
        if world.is_main
        else None
    ]
    if world.size > 1:
        torch.distributed.broadcast_object_list(found, 0)
    assert found[0] is not None
    return found[0]


def _begun(
    around: ExitStack, output: Output, place: Place, result: str, begin: Begin
) -> tuple[Adapter, list[str]]:
    """The adapter that the run begins with: made once, with its columns reserved while it trains."""
    path, world = place.folder / START, distributed.world()

    def held(base: Mapping[str, Any], wanted: int | Sequence[int]) -> Reservation:
        return around.enter_context(reserve(output.adapters, base, wanted, place.name, output.asked))

    if path.is_file():
        with torch.inference_mode(False):
            adapter = load(path)
        terms = [term for layer in adapter.layers.values() for term in layer.terms]
        columns = sorted({column for term in terms for column in term.config.singular_columns})
        if not columns or not world.is_main:
            return adapter, []
        notes = held(adapter.provenance.base, columns).notes
        return adapter, [note for note in notes if f"taken by {result}" not in note]
    more: list[str] = []
    if world.is_main:
        adapter, more = begin(place.name, held)
        if place.step:
            more = [f"{path} is gone: what the run began with is made anew", *more]
        with torch.inference_mode(False):
            save(adapter, path)
    if world.size > 1:
        torch.distributed.barrier()
        adapter = load(path)
    return adapter, more


def new_adapter(
    settings: AdapterSettings,
    weights: Mapping[str, Tensor],
    provenance: Provenance,
    seed: int,
    reserve: Reserve,
    basis_of: Callable[[MethodConfig], Callable[[str, Tensor], Basis] | None],
    read: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> tuple[Adapter, list[str]]:
    """A new adapter on those layers that are large enough, in columns that nobody else has; what to say.

    weights: by layer, on the meta device where ``read`` gives their numbers.
    """
    columns, notes = settings.columns, list[str]()
    if settings.needs_columns:
        held = reserve(provenance.base, settings.columns or settings.rank)
        columns, notes = held.columns, list(held.notes)
    method = settings.method_config(columns or tuple(range(settings.rank)))
    kept, more = fitting(weights, method)
    generator = torch.Generator().manual_seed(seed)
    return create(read(kept), method, basis_of(method), generator, provenance), notes + more


def _train(output: Output, place: Place, ready: Prepared, notes: Sequence[str]) -> TrainResult:
    run = Run(
        folder=place.folder,
        checkpoint_every=output.checkpoint_every,
        sample_every=output.sample_every,
        sampler=ready.sampler,
        listener=output.listener,
        cancel=output.cancel,
    )
    if output.listener is not None:
        for note in notes:
            output.listener({"event": "warning", "step": 0, "text": note})
    try:
        return train(ready.setup, ready.config, ready.method, run=run)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SpectralAdapterError(f"run {place.name}: {explained(place.folder)}") from error
