"""The demo's learning rates: a sweep on the embedded model, each method at each rate, several seeds.

    python -m benchmarks.quality.demo_rates --method foura --rates 1e-3 3e-3 --seeds 0 1

Every cell trains both of the demo's drawn concepts exactly as ``python dev.py demo`` does, and draws the
demo's prompts with each adapter alone, with both stacked and with both fused, and both in one picture.
A number is the share of the pictures that the shipped classifier reads as their character, the mean of the
two; its spread is that of the seeds. ``score`` is the concept score alone. The demo takes the best rate.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from PIL import Image

from benchmarks.common import finish
from spectral_core.adapter.adapter import Adapter
from spectral_core.demo import run as demo_run
from spectral_core.demo.command import parser as demo_parser
from spectral_core.demo.concepts import DemoConcept, fill_up, prompts_together
from spectral_core.demo.scores import Scorer
from spectral_core.pipelines import apply
from spectral_core.pipelines.loading import EMBEDDED, native_size


def drawn(
    pipe: Any,
    concepts: Sequence[DemoConcept],
    settings: demo_run.DemoSettings,
    adapters: Sequence[Sequence[Adapter]],
) -> list[list[Image.Image]]:
    """Each concept's pictures; ``adapters[i]`` are on while the prompts of concept i are drawn."""
    found = []
    for concept, used in zip(concepts, adapters, strict=True):
        prompts, seeds = demo_run.columns([concept], settings)
        with apply(pipe, *used):
            found.append(demo_run.draw_pictures(pipe, prompts, seeds, settings, lambda _: None))
    return found


def cell(pipe: Any, options: argparse.Namespace, rate: float, seed: int, folder: Path) -> dict[str, float]:
    """One rate and one seed: losses and scores."""
    demo_options = demo_parser().parse_args(["--output", str(folder), "--seed", str(seed)])
    settings = demo_run.default_settings(pipe, demo_options)
    train = replace(settings.train[options.method], learning_rate=rate)
    if options.target_open is not None:
        train = replace(train, target_open=options.target_open)
    if options.steps is not None:
        train = replace(train, steps=options.steps)
    settings = replace(settings, train={options.method: train}, per_prompt=options.per_prompt)
    if options.rank is not None:
        settings = replace(settings, rank=options.rank)
    concepts = fill_up([], demo_options.output, native_size(pipe)[0])
    trained, losses = [], []
    for position, concept in enumerate(concepts):
        job = demo_run.job_of(concept, options.method, position, settings)
        name = f"{concept.name}_{options.method}_{rate}_{seed}"
        done = demo_run.train_one(pipe, concept, job, train, folder, name)
        losses.append(done.record["loss_after"])
        trained.append(done.adapter)
    fused = demo_run.keep_each(pipe, concepts, trained, settings).adapter
    scorer = Scorer(EMBEDDED)
    used = {"alone": [[a] for a in trained], "stacked": [trained] * 2, "fused": [[fused]] * 2}
    measured: dict[str, float] = {"loss": fmean(losses)}
    for name, adapters in used.items():
        pictures = drawn(pipe, concepts, settings, adapters)
        each = list(zip(concepts, pictures, strict=True))
        measured[name] = fmean(scorer.named(c, p) for c, p in each)
        if name == "alone":
            measured["score"] = fmean(scorer.concept_score(c, p) for c, p in each)
    prompts = prompts_together(concepts, settings.per_prompt, settings.embedded)
    with apply(pipe, fused):
        seeds, width = list(range(len(prompts))), settings.wide
        both = demo_run.draw_pictures(pipe, prompts, seeds, settings, lambda _: None, width)
    return measured | {"both": scorer.both_named(concepts, both)}


def row(rate: float, cells: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over the seeds, and the spread (standard deviation) of each score."""
    found: dict[str, Any] = {"rate": rate, "seeds": len(cells)}
    for key in cells[0]:
        values = [c[key] for c in cells]
        found[key] = fmean(values)
        if len(values) > 1:
            found[f"{key} ±"] = stdev(values)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--method", choices=list(demo_run.METHOD_NAMES), default="foura")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--target-open", type=float)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", help="of the result file; demo_rates_<method> without it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pipe = demo_run.open_model(None)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for rate in options.rates:
            cells = [cell(pipe, options, rate, seed, Path(folder)) for seed in options.seeds]
            rows.append(row(rate, cells))
            print(rows[-1], file=sys.stderr, flush=True)
    return finish(options.name or f"demo_rates_{options.method}", rows, [], vars(options))


if __name__ == "__main__":
    sys.exit(main())
