"""Train, distil, and fuse by what layers see, on the model that the webui has loaded.

Adapters lie in the library's first folder and runs beside it; the same settings under the same name go on
where they stopped, or give what is finished (:mod:`spectral_core.training.engine.named_run`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch

from spectral_core.adapter.adapter import Adapter
from spectral_core.analysis import overlap_picture
from spectral_core.files import adapter_file
from spectral_core.fusion import FUSIONS, fuse
from spectral_core.fusion.rounds import ROUNDS, ByConcept, fuse_in_rounds
from spectral_core.fusion.sources import labels_of
from spectral_core.pipelines.distil import DistilJob, distil
from spectral_core.pipelines.job import Job as Concept
from spectral_core.pipelines.loading import native_size
from spectral_core.pipelines.statistics import Looking, concept_statistics
from spectral_core.pipelines.train import train_adapter
from spectral_core.plots.lines import line_plot
from spectral_core.statistics import prompts as concept_prompts
from spectral_core.training.config.adapter import KeptEvery, RunSettings
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.config.reading import reader_of
from spectral_core.training.config.setting import Setting, settings_of
from spectral_core.training.engine.named_run import Output, Trained
from spectral_core.training.objectives.distillation import DISTIL
from spectral_core.words import chosen

from . import tools
from .jobs import Job
from .library import Library
from .pipeline import HostPipeline

METHODS = tuple(name for name, fusion in FUSIONS.items() if fusion.needs_statistics)
Opened = Callable[[], Any]
"""() -> a context in which the host's model is ready to train, as a :class:`.pipeline.HostPipeline`."""

GROUPS: tuple[str, ...] = ("adapter", "pictures", "text encoder", "regularisation", "validation")
GROUPS += ("optimiser", "noise", "gate", "memory", "run")
_NOT_HERE = ("cache", "processes", "images", "token")


def train_settings() -> dict[str, Setting]:
    """Name -> row of the table of settings, those that can be set in a webui."""
    found = settings_of(TrainConfig, Concept, RunSettings)
    return {name: row for name, row in found.items() if name not in _NOT_HERE}


def distil_settings() -> dict[str, Setting]:
    """The same of a distillation, with its own defaults."""
    ours = {f.name: getattr(DISTIL, f.name) for f in fields(DISTIL)}
    found = settings_of(TrainConfig, DistilJob, KeptEvery)
    rows = {n: replace(row, default=ours.get(n, row.default)) for n, row in found.items()}
    unused = (*_NOT_HERE, "prior_weight", "preserve_every", "preserve_weight")
    gates = {n for n, row in found.items() if row.words.group in ("gate", "validation", "text encoder")}
    return {n: row for n, row in rows.items() if n not in unused and n not in gates}


def read(values: Mapping[str, Any], rows: Mapping[str, Setting]) -> dict[str, Any]:
    """Settings from a page's fields or a program's JSON; what is left at its default is left out.

    Raises SpectralAdapterError for an unknown name (with near ones) and values that cannot be read.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        row = rows[chosen(name, tuple(rows), "setting")]
        if value is None or (value == "" and row.kind is not str):
            continue
        read_value = _one(row, value)
        if read_value != row.default:
            row.check(read_value)
            found[name] = read_value
    return found


def _one(row: Setting, value: Any) -> Any:
    if row.kind is tuple:
        if not isinstance(value, str):
            return tuple(value)
        reader = reader_of(row)
        return tuple(filter(None, map(str.strip, value.splitlines()))) if reader is str else reader(value)
    if row.kind is int and isinstance(value, float) and value.is_integer():  # a page's numbers
        return int(value)
    if row.kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def shown(row: Setting) -> Any:
    """A setting's default as a page's field has it."""
    if row.kind is not tuple:
        return row.default
    if row.default is None:
        return ""
    if row.item is str:
        return "\n".join(row.default)
    return ("x" if row.item is int and row.length else ",").join(map(str, row.default))


def _only(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in values.items() if n in cls.__dataclass_fields__}


def _output(library: Library, name: str, values: Mapping[str, Any], job: Job) -> Output:
    every = {key: values[key] for key in ("checkpoint_every", "sample_every") if key in values}
    adapters = library.folders[0]
    runs = adapters.with_name(adapters.name + "_runs")  # beside them: the cards list every folder below
    stem = tools.file_name(name, adapters)
    return Output(adapters, stem, True, job, job.cancel, runs=runs, **every)


@contextmanager
def _trains() -> Iterator[None]:
    """Out of the modes in which webuis draw."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def train(
    library: Library, opened: Opened, images: str, token: str, name: str, values: Mapping[str, Any], job: Job
) -> tuple[str, Any]:
    """Train a concept from a folder of pictures; the report, and the losses as a picture."""
    config = TrainConfig(**_only(TrainConfig, values))
    output = _output(library, name, values, job)
    with _trains(), opened() as pipe:
        own = _only(Concept, values)
        own.setdefault("size", native_size(pipe))
        concept = Concept(images=images.strip(), token=token.strip(), cache=False, **own)
        job.say("looking at the pictures")
        done = train_adapter(pipe, concept, config, output)
    return _ended(done, config, library)


def fuse_seen(library: Library, opened: Opened, asked: tools.FuseSettings, job: Job) -> tuple[str, Any]:
    """Fuse by what each concept does to its own inputs; the report and the overlap picture."""
    method = chosen(asked.method, METHODS, "method")
    given = asked.weight_of_each()
    path = tools.new_file(library.folders[0], asked.name or "fused")
    with _trains(), opened() as pipe:
        adapters = [library.load(library.find(each)) for each in asked.names]
        told = _prompts(adapters, given, asked.prompts)
        found = _looked_at(pipe, adapters, given, told, asked.size, job)
        with torch.no_grad():
            done = fuse_in_rounds(
                found,
                lambda seen: fuse(
                    adapters,
                    method,
                    given,
                    asked.rank or None,
                    freeze_gates=asked.freeze_gates,
                    name=path.stem,
                    statistics=seen,
                ),
                ROUNDS,
            )
            adapter_file.save(done.fused.adapter, path)
            before = overlap_picture.examine(adapters, given, done.statistics)
            picture = overlap_picture.draw(adapters, before, done.fused.report)
    text = [f"saved as {tools.shown_name(path, library)}", done.fused.report.text]
    return "\n".join([*text, *(f"before: {w}" for w in before.warnings)]), picture


def distilled(
    library: Library, opened: Opened, asked: tools.FuseSettings, values: Mapping[str, Any], job: Job
) -> tuple[str, Any]:
    """Fuse in closed form, and train the result to draw what each draws."""
    given = asked.weight_of_each()
    config = replace(DISTIL, **_only(TrainConfig, values))
    output = _output(library, asked.name or "distilled", values, job)
    with _trains(), opened() as pipe:
        own = _only(DistilJob, values)
        own.setdefault("size", native_size(pipe))
        settings = DistilJob(**own)
        loaded = [library.load(library.find(each)) for each in asked.names]
        adapters = [a.scaled(w) for a, w in zip(loaded, given, strict=True)]
        told = _prompts(adapters, [1.0] * len(adapters), asked.prompts)

        def begin() -> Adapter:
            ones = [1.0] * len(adapters)
            look = _looked_at(pipe, adapters, ones, told, settings.size, job)
            with torch.no_grad():
                done = fuse_in_rounds(
                    look,
                    lambda seen: fuse(adapters, "closed-form", rank=asked.rank or None, statistics=seen),
                    ROUNDS,
                )
            return done.fused.adapter

        drawn = 0

        def sampled(count: int) -> None:
            nonlocal drawn
            drawn += count
            job.say(f"{drawn} samples drawn")
            job.check()

        rank = {"rank": asked.rank}
        done = distil(pipe, begin, adapters, told, settings, config, output, rank, sampled)
    return _ended(done, config, library)


def _prompts(adapters: Sequence[Adapter], weights: Sequence[float], text: str) -> Sequence[Sequence[str]]:
    """One line for each adapter; without one its trigger words."""
    labels = labels_of(adapters)
    found = concept_prompts.read(text or "", labels, adapters)
    wanted = [bool(p) or not w * a.strength for p, w, a in zip(found, weights, adapters, strict=True)]
    concept_prompts.require(wanted, labels, "prompts")
    return found


def _looked_at(
    pipe: HostPipeline,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    prompts: Sequence[Sequence[str]],
    size: tuple[int, int] | None,
    job: Job,
) -> Callable[[Adapter | None], ByConcept]:
    signs = [(w * a.strength > 0) - (w * a.strength < 0) for w, a in zip(weights, adapters, strict=True)]
    looking = Looking(size=size or native_size(pipe), rounds=ROUNDS)

    def look(under: Adapter | None) -> ByConcept:
        def seen(place: int) -> None:
            job.say(f"looked at concept {place + 1} of {len(adapters)}")
            job.check()

        job.say("looking at the concepts" if under is None else "looking at what was fused")
        job.check()
        return concept_statistics(pipe, adapters, prompts, looking, signs, seen, under)

    return look


def _ended(done: Trained, config: TrainConfig, library: Library) -> tuple[str, Any]:
    steps = len(done.result.losses)
    if done.reused:
        name = tools.shown_name(done.path, library)
        lines = [f"{done.place.name} is finished already ({done.place.step} steps): {name}"]
    elif done.result.stopped:
        lines = [f"stopped at step {steps} of {config.steps}; the same settings go on from there"]
    else:
        name = tools.shown_name(done.path, library)
        lines = [
            f"saved as {name}: {done.adapter.parameter_count:,} parameters, {done.result.seconds:.0f} s",
            *done.notes,
        ]
    if not steps:
        return "\n".join(lines), None
    series = {"loss": (list(range(1, steps + 1)), list(done.result.losses))}
    return "\n".join(lines), line_plot(series, "step", "loss", done.place.name)
