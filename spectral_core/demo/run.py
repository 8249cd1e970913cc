"""The demo's work: settings, four short trainings with reuse, and the pictures of every row."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..adapter.adapter import Adapter
from ..analysis.interference import crosstalk, retention
from ..errors import SpectralAdapterError
from ..files.adapter_file import load, save
from ..files.container import strict_json
from ..files.reading import read_text
from ..fusion import FusionMethod, FusionReport, freeze, fuse
from ..gates.record import GateRecorder
from ..maths.svd_cache import SVDCache, default_cache_folder
from ..methods import MethodConfig, config_to_dict
from ..methods.foura import FouRAConfig
from ..methods.spectral_a import SpectralAConfig
from ..pipelines import ConceptConfig, apply, generate, load_pipeline, train_concept
from ..pipelines.inputs import recorded_inputs
from ..pipelines.loading import quiet_libraries
from ..training.config.config import TrainConfig
from ..whole_file import write_whole
from .concepts import DemoConcept

FUSION_OF: dict[str, FusionMethod] = {"foura": "sum", "spectral_a": "spectral"}
EMBEDDED_TARGETS = "down_blocks.*, mid_block.*, up_blocks.*"  # all but the four-channel layers at both ends
METHOD_NAMES = {"foura": "FouRA", "spectral_a": "Spectral A"}
Method = str


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
    """One row of the contact sheet: which adapters were on, and a picture per column."""

    label: str
    adapters: list[Adapter]
    pictures: list[Image.Image] = field(default_factory=list)
    recorder: GateRecorder | None = None
    fusion: FusionReport | None = None
    retention: tuple[float | None, ...] = ()
    crosstalk: tuple[tuple[float | None, ...], ...] = ()


def open_model(path: Path | None) -> Any:
    """The embedded model, or the user's."""
    quiet_libraries()
    return load_pipeline(path)


def default_settings(pipe: Any, options: argparse.Namespace) -> DemoSettings:
    """The embedded model trains all layers at its own 64 pixels; a real one its attention layers."""
    embedded = options.model is None
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    size = pipe.unet.config.sample_size * factor if options.size is None else options.size
    steps = options.steps
    if steps is None:
        steps = 2 if options.quick else 120 if embedded else 300
    rates = {"foura": 6e-3, "spectral_a": 2.5e-3} if embedded else {"foura": 0.0, "spectral_a": 0.0}
    if size < factor or size % factor:
        raise SpectralAdapterError(f"--size {size}: expected a multiple of {factor} pixels")
    train = {
        method: TrainConfig(
            steps=steps,
            batch_size=8 if embedded else 1,
            learning_rate=rate,
            token_learning_rate=2e-2 if embedded else 5e-4,
            schedule="cosine",
            target_open=0.0,  # in so few steps a target costs score
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
        sample_steps=2 if options.quick else 25,
        guidance=4.0 if embedded else 7.5,
        per_prompt=1 if options.quick else 4,
        seed=options.seed,
    )


def method_config(method: Method, position: int, rank: int) -> MethodConfig:
    """FouRA with its adaptive gate; Spectral A in the concept's own block of singular columns."""
    if method == "foura":
        return FouRAConfig(rank=rank, transform="dct", gate="adaptive")
    return SpectralAConfig(columns=tuple(range(position * rank, (position + 1) * rank)))


def train_all(
    pipe: Any, concepts: list[DemoConcept], settings: DemoSettings, output: Path, fresh: bool
) -> list[TrainedAdapter]:
    """Every concept with every method: trained, saved and loaded back, or reused when nothing has changed."""
    cache = SVDCache(default_cache_folder())
    folder = output / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    trained = []
    for method in METHOD_NAMES:
        for position, concept in enumerate(concepts):
            config = method_config(method, position, settings.rank)
            digest = settings_digest(concept, config, settings)
            path = folder / f"{concept.name}_{method}.safetensors"
            record_path = path.with_suffix(".json")
            record = None if fresh else read_record(path, record_path, digest)
            reused = record is not None
            if record is None:
                record = train_one(pipe, concept, method, config, settings, cache, path)
                record["digest"] = digest
                write_whole(record_path, json.dumps(record, indent=1))
            else:
                print(f"{METHOD_NAMES[method]} on {concept.token}: reused {path.name}")
            trained.append(TrainedAdapter(concept, method, load(path), path, reused, record))
    return trained


def train_one(
    pipe: Any,
    concept: DemoConcept,
    method: Method,
    config: MethodConfig,
    settings: DemoSettings,
    cache: SVDCache,
    path: Path,
) -> dict[str, Any]:
    """One training with a progress bar, saved to ``path``; the numbers of the run."""
    train = settings.train[method]
    what = ConceptConfig(concept.token, settings.targets, concept.init_words, (settings.size, settings.size))
    started = time.perf_counter()
    with tqdm(total=train.steps, desc=f"{METHOD_NAMES[method]} on {concept.token}", unit="step") as bar:

        def listen(event: dict[str, Any]) -> None:
            bar.update(event["step"] - bar.n)
            bar.set_postfix(loss=f"{event['loss']:.4f}")

        done = train_concept(pipe, concept.folder, what, config, train, cache=cache, listener=listen)
    save(done.adapter, path, overwrite=True)
    if done.result.stopped:
        raise KeyboardInterrupt
    return {
        "loss_before": done.loss_before,
        "loss_after": done.loss_after,
        "seconds": time.perf_counter() - started,
        "steps": train.steps,
        "learning_rate": train.rate_for(method),
        "parameters": done.adapter.parameter_count,
        "bytes": path.stat().st_size,
    }


def settings_digest(concept: DemoConcept, config: MethodConfig, settings: DemoSettings) -> str:
    """Changes with the pictures, the captions and every setting that training depends on."""
    digest = hashlib.sha256()
    train = settings.train[config.method].as_dict()
    plain = [
        config_to_dict(config),
        train,
        concept.token,
        concept.init_words,
        settings.targets,
        settings.size,
    ]
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for path in sorted(concept.folder.rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def read_record(path: Path, record_path: Path, digest: str) -> dict[str, Any] | None:
    """The record of an adapter that was trained with exactly these settings, or None."""
    if not (path.is_file() and record_path.is_file()):
        return None
    try:
        record: dict[str, Any] = strict_json(read_text(record_path))
    except SpectralAdapterError:
        return None  # trained again
    return record if isinstance(record, dict) and record.get("digest") == digest else None


def generate_rows(
    pipe: Any, concepts: list[DemoConcept], trained: list[TrainedAdapter], settings: DemoSettings
) -> list[Row]:
    """Base, each adapter alone, stacked and fused: the same prompts and seeds in every row."""
    rows = [Row("base model", [])]
    rows += [
        Row(f"{METHOD_NAMES[t.method]} {t.concept.token}", [t.adapter], recorder=_recorder(t.method))
        for t in trained
    ]
    fusions = []
    if len(concepts) > 1:
        for method, name in METHOD_NAMES.items():
            alone = [t.adapter for t in trained if t.method == method]
            fused = fuse(alone, method=FUSION_OF[method])
            rows.append(Row(f"{name}: stacked", alone))
            rows.append(Row(f"{name}: fused", [fused.adapter], fusion=fused.report))
            fusions.append((rows[-1], fused.adapter, alone))
    prompts, seeds = columns(concepts, settings)
    with tqdm(total=len(rows) * len(prompts), desc="pictures", unit="picture") as bar:
        for row in rows:
            with apply(pipe, *row.adapters, recorder=row.recorder):
                row.pictures = draw_pictures(pipe, prompts, seeds, settings, bar.update)
    for row, adapter, alone in fusions:
        measure_fusion(pipe, concepts, settings, row, adapter, alone)
    return rows


def draw_pictures(
    pipe: Any, prompts: list[str], seeds: list[int], settings: DemoSettings, on_batch: Callable[[int], object]
) -> list[Image.Image]:
    return generate(
        pipe,
        prompts,
        seeds,
        steps=settings.sample_steps,
        guidance=settings.guidance,
        size=(settings.size, settings.size),
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


def columns(concepts: list[DemoConcept], settings: DemoSettings) -> tuple[list[str], list[int]]:
    """Prompts and seeds of the columns: per_prompt pictures for each concept."""
    prompts = [p for c in concepts for p in c.prompts(settings.per_prompt, settings.embedded)]
    return prompts, [1000 + settings.seed + i for i in range(len(prompts))]


def _recorder(method: Method) -> GateRecorder | None:
    return GateRecorder() if method == "foura" else None
