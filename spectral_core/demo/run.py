"""The demo's work: settings, four short trainings with reuse, and the pictures of every row."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..adapter.adapter import Adapter
from ..analysis.interference import crosstalk, retention
from ..errors import SpectralAdapterError
from ..files.adapter_file import load
from ..fusion import Fused, FusionReport, freeze, fuse
from ..fusion.rounds import fuse_in_rounds
from ..gates.record import GateRecorder
from ..pipelines import apply, generate, load_pipeline
from ..pipelines.inputs import recorded_inputs
from ..pipelines.job import Job
from ..pipelines.loading import native_size, quiet_libraries
from ..pipelines.statistics import Looking, concept_statistics
from ..pipelines.train import evaluate, train_adapter
from ..statistics.moments import Statistics
from ..training.config.adapter import Method
from ..training.config.config import TrainConfig
from ..training.engine.named_run import RUNS, START, Output
from .concepts import DemoConcept, prompts_together

EMBEDDED_TARGETS = "down_blocks.*, mid_block.*, up_blocks.*"  # all but the four-channel layers at both ends
METHOD_NAMES: dict[Method, str] = {"foura": "FouRA", "spectral_a": "Spectral A"}
KEPT_EVERY = 20  # steps between checkpoints; writing one takes less than a step


@dataclass(frozen=True)
class DemoSettings:
    """Numbers of the run; the embedded model's learning rates are from
    ``benchmarks/quality/demo_rates.py``."""

    embedded: bool
    size: int
    rank: int
    targets: str
    train: dict[Method, TrainConfig]
    sample_steps: int
    guidance: float
    per_prompt: int
    together: int  # pictures of all concepts at once
    wide: int  # their width
    seed: int


@dataclass
class TrainedAdapter:
    """A trained (or reused) adapter as loaded back from its file, and the numbers of its training."""

    concept: DemoConcept
    method: Method
    adapter: Adapter
    path: Path
    reused: bool
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """One row of the contact sheet: the adapters that are on in each concept's columns and, if any, in those
    of all concepts at once; a picture per column, or a gap."""

    label: str
    adapters: list[list[Adapter]]
    together: list[Adapter] | None = None
    pictures: list[Image.Image | None] = field(default_factory=list)
    recorder: GateRecorder | None = None  # of the first concept's pictures
    fusion: FusionReport | None = None
    retention: tuple[float | None, ...] = ()
    crosstalk: tuple[tuple[float | None, ...], ...] = ()


def open_model(path: Path | None) -> Any:
    """The embedded model, or the user's."""
    quiet_libraries()
    return load_pipeline(path)


def default_settings(pipe: Any, options: argparse.Namespace) -> DemoSettings:
    """The embedded model trains all layers at its own size; a real one its attention layers."""
    embedded = options.model is None
    factor = int(pipe.vae_scale_factor)
    size = native_size(pipe)[0] if options.size is None else options.size
    steps = options.steps
    if steps is None:
        steps = 2 if options.quick else 160 if embedded else 300
    rates: dict[Method, float] = {"foura": 0.0, "spectral_a": 0.0}
    if embedded:
        # Two seeds of the sweep: at 3e-3 and 6e-3 nearly every picture is named, at 1.2e-2 fewer, and both in
        # one picture half as often (docs/training.md). Loss is least at 1.2e-2 and 6e-3.
        rates = {"foura": 6e-3, "spectral_a": 4.3e-3}
    if size < factor or size % factor:
        raise SpectralAdapterError(f"--size {size}: expected a multiple of {factor} pixels")
    train = {
        method: TrainConfig(
            steps=steps,
            batch_size=8 if embedded else 1,
            learning_rate=rate,
            token_learning_rate=2e-2 if embedded else 5e-4,
            schedule="cosine",
            preserve_every=0,  # the reported loss is that of the pictures alone
            seed=options.seed,
        )
        for method, rate in rates.items()
    }
    return DemoSettings(
        embedded=embedded,
        size=size,
        rank=8 if options.rank is None else options.rank,
        targets=EMBEDDED_TARGETS if embedded else "attention",
        train=train,
        sample_steps=2 if options.quick else 20,
        guidance=4.0 if embedded else 7.5,
        per_prompt=1 if options.quick else 3,
        together=1 if options.quick else 2,
        wide=size * 3 // 2 // factor * factor,
        seed=options.seed,
    )


def job_of(concept: DemoConcept, method: Method, position: int, settings: DemoSettings) -> Job:
    """FouRA with its adaptive gate; Spectral A in the concept's own block of singular columns."""
    first = position * settings.rank
    return Job(
        str(concept.folder),
        concept.token,
        size=(settings.size, settings.size),
        method=method,
        rank=settings.rank,
        columns=tuple(range(first, first + settings.rank)) if method == "spectral_a" else (),
        targets=settings.targets,
        init_words=concept.init_words,
    )


def train_all(
    pipe: Any, concepts: list[DemoConcept], settings: DemoSettings, output: Path, fresh: bool
) -> list[TrainedAdapter]:
    """Every concept with every method: trained, gone on with where an earlier run was stopped or killed, or
    reused when nothing has changed."""
    folder, trained = output / "adapters", []
    for method in METHOD_NAMES:
        for position, concept in enumerate(concepts):
            job = job_of(concept, method, position, settings)
            first = f"{concept.name}_{method}"
            names = (first if number == 1 else f"{first}-{number}" for number in count(1))
            name = next(each for each in names if not (fresh and (folder / RUNS / each).exists()))
            trained.append(train_one(pipe, concept, job, settings.train[method], folder, name))
    return trained


def train_one(
    pipe: Any, concept: DemoConcept, job: Job, config: TrainConfig, folder: Path, name: str
) -> TrainedAdapter:
    """One training with a progress bar, and its numbers."""
    title = f"{METHOD_NAMES[job.method]} on {concept.token}"
    with tqdm(total=config.steps, desc=title, unit="step", leave=False) as bar:

        def listen(event: dict[str, Any]) -> None:
            if event["event"] in ("resume", "step"):
                bar.update(event["step"] - bar.n)
            if event["event"] == "step":
                bar.set_postfix(loss=f"{event['loss']:.4f}")

        output = Output(folder, name, listener=listen, checkpoint_every=KEPT_EVERY)
        done = train_adapter(pipe, job, config, output)
    if done.result.stopped:
        raise KeyboardInterrupt
    print(f"{title}: {'reused ' if done.reused else ''}{done.path.name}")
    record = {
        "loss_before": evaluate(pipe, job, load(done.place.folder / START)),
        "loss_after": evaluate(pipe, job, done.adapter),
        "seconds": done.result.seconds,
        "steps": config.steps,
        "learning_rate": config.rate_for(job.method),
        "parameters": done.adapter.parameter_count,
        "bytes": done.path.stat().st_size,
    }
    return TrainedAdapter(concept, job.method, load(done.path), done.path, done.reused, record)


def generate_rows(
    pipe: Any, concepts: list[DemoConcept], trained: list[TrainedAdapter], settings: DemoSettings
) -> list[Row]:
    """The base model, then per method: each concept by its own adapter, both in one adapter, both simply
    added. The same prompts and seeds in every row."""
    several = len(concepts) > 1
    rows = [Row("base model", [[]] * len(concepts), together=[] if several else None)]
    fusions = []
    for method, name in METHOD_NAMES.items():
        alone = [t.adapter for t in trained if t.method == method]
        each = "each alone" if several else concepts[0].token
        rows.append(Row(f"{name}: {each}", [[a] for a in alone], recorder=_recorder(method)))
        if several:
            fused, added = keep_each(pipe, concepts, alone, settings), fuse(alone, "sum")
            one, both = [fused.adapter], [list(alone)]
            rows.append(Row(f"{name}: in one adapter", [one, one], together=one, fusion=fused.report))
            rows.append(Row(f"{name}: simply added", both * 2, together=alone, fusion=added.report))
            fusions += [(rows[-2], fused.adapter, alone), (rows[-1], added.adapter, alone)]
    prompts, seeds = columns(concepts, settings)
    last = columns_together(concepts, settings)
    with tqdm(total=len(rows) * len(prompts), desc="pictures", unit="picture") as bar:

        def draw(
            own: slice, adapters: list[Adapter], recorder: GateRecorder | None = None, width: int = 0
        ) -> list[Image.Image]:
            with apply(pipe, *adapters, recorder=recorder):
                return draw_pictures(pipe, prompts[own], seeds[own], settings, bar.update, width)

        for row in rows:
            for position, adapters in enumerate(row.adapters):
                own = own_columns(position, settings)
                row.pictures += draw(own, adapters, None if position else row.recorder)
            if row.together is None:
                row.pictures += [None] * len(prompts[last])
                bar.update(len(prompts[last]))
            else:
                row.pictures += draw(last, row.together, width=settings.wide)
    for row, adapter, alone in fusions:
        measure_fusion(pipe, concepts, settings, row, adapter, alone)
    return rows


def keep_each(pipe: Any, concepts: list[DemoConcept], alone: list[Adapter], settings: DemoSettings) -> Fused:
    """Both in one adapter that does what each does on what its layers see then: closed form, two looks."""
    prompts = [c.prompts(settings.per_prompt, settings.embedded) for c in concepts]
    looking = Looking(
        guidance=settings.guidance, size=(settings.size, settings.size), seed=settings.seed, rounds=2
    )

    def look(under: Adapter | None) -> list[Mapping[str, Statistics]]:
        return concept_statistics(pipe, alone, prompts, looking, under=under)

    return fuse_in_rounds(look, lambda seen: fuse(alone, "closed-form", statistics=seen)).fused


def draw_pictures(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    settings: DemoSettings,
    on_batch: Callable[[int], object],
    width: int = 0,
) -> list[Image.Image]:
    """width: in pixels, 0 for squares."""
    return generate(
        pipe,
        prompts,
        seeds,
        steps=settings.sample_steps,
        guidance=settings.guidance,
        size=(width or settings.size, settings.size),
        batch_size=len(prompts) if settings.embedded else 1,
        on_batch=on_batch,
    )


def measure_fusion(
    pipe: Any,
    concepts: list[DemoConcept],
    settings: DemoSettings,
    row: Row,
    fused: Adapter,
    alone: list[Adapter],
) -> None:
    """Retention and crosstalk on the activations of a short generation under each concept (gates frozen)."""
    inputs = []
    for concept, adapter in zip(concepts, alone, strict=True):
        prompts = concept.prompts(2, settings.embedded)
        with apply(pipe, adapter), recorded_inputs(pipe, list(adapter.layers)) as seen:
            short = replace(settings, sample_steps=4)
            draw_pictures(pipe, prompts, list(range(len(prompts))), short, lambda _: None)
        inputs.append(seen)
    frozen = [freeze(a) for a in alone]
    row.retention = retention(freeze(fused), frozen, inputs).total
    row.crosstalk = crosstalk(frozen, inputs).total


def columns(concepts: Sequence[DemoConcept], settings: DemoSettings) -> tuple[list[str], list[int]]:
    """Prompts and seeds of the columns: per_prompt pictures for each concept, then of two in one picture."""
    prompts = [p for c in concepts for p in c.prompts(settings.per_prompt, settings.embedded)]
    if len(concepts) > 1:
        prompts += prompts_together(concepts, settings.together, settings.embedded)
    return prompts, [1000 + settings.seed + i for i in range(len(prompts))]


def own_columns(position: int, settings: DemoSettings) -> slice:
    """Those of the concept at this position."""
    return slice(position * settings.per_prompt, (position + 1) * settings.per_prompt)


def columns_together(concepts: Sequence[DemoConcept], settings: DemoSettings) -> slice:
    """Those of all concepts in one picture: the last ones, none with one concept."""
    return slice(len(concepts) * settings.per_prompt, None)


def _recorder(method: Method) -> GateRecorder | None:
    return GateRecorder() if method == "foura" else None
