"""Three concepts in one model: which adapters and which fusion keep them apart.

The task, fixed before any method was run: the characters bot, fish and imp (the bot recoloured and upside
down), trained apart on pictures whose captions share every word but the name; LoRA, FouRA and Spectral A of
one size, the Spectral ones once all in the top columns and once in columns of their own; fused at strength
1; every method at the rate of its own sweep, over several seeds. Statistics are those of four generations per
concept, without guidance. Pictures are judged under other wordings than those that statistics and
distillation are drawn with; ``sum, best weight`` is the sum at the weight that is best under the latter (the
average is one of them).

Added when closed-form was seen, on three seeds, not to keep all of the concepts: ``lora attention``, adapters
on the attention layers alone, as in the papers; and rounds, statistics collected again under what was fused
first; and distillation, which trains what was fused to predict as each concept's own adapter does. The later
seeds were drawn after these choices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.claims.drawings import BACKGROUNDS
from benchmarks.claims.lab import BATCH, GUIDANCE, SIZE, Lab, Recipe, Task
from benchmarks.claims.measure import FITTED, CharacterMeter
from benchmarks.claims.recipes import RANK, attention_lora, block, foura, lora, orthogonal
from demo_model import draw
from spectral_core.adapter.adapter import Adapter
from spectral_core.fusion import Fused, fuse
from spectral_core.fusion.rounds import fuse_in_rounds
from spectral_core.pipelines import apply, generate
from spectral_core.pipelines.distil import DistilJob, distil
from spectral_core.statistics.collect import collect, modules_of
from spectral_core.statistics.moments import Statistics
from spectral_core.training.engine.named_run import Output
from spectral_core.training.objectives.distillation import DISTIL

NAMES = ("bot", "fish", "imp")
GUIDED = "closed-form, statistics under guidance"
RETAKEN = "closed-form, statistics of the fused model"  # of it alone, those of the first round forgotten
TWO_ROUNDS = "closed-form, two rounds"
TUNED = "sum, best weight"

FAMILIES: Mapping[str, tuple[Callable[[int], Recipe], tuple[str, ...]]] = {
    "lora": (
        lambda _: lora(RANK),
        ("sum", "average", TUNED, "subspaces", "closed-form", GUIDED, "closed-form-rank", "gradient"),
    ),
    "spectral_a same columns": (lambda _: block(0), ("sum", "spectral", "average", TUNED, "closed-form")),
    "spectral_a own columns": (block, ("spectral", "average", TUNED, "closed-form")),
    "orthogonal": (orthogonal, ("orthogonal", "average", TUNED, "closed-form")),
    "foura": (lambda _: foura("dct", "adaptive"), ("sum", "average", TUNED, "closed-form")),
    "lora attention": (lambda _: attention_lora(), ("sum", "average", "closed-form", RETAKEN)),
}
"""Family -> the recipe of the concept at each place, and its fusions."""
ROUNDS: Mapping[str, Mapping[str, int]] = {
    "lora": {TWO_ROUNDS: 2, "closed-form, three rounds": 3},
    "spectral_a same columns": {TWO_ROUNDS: 2},
    "spectral_a own columns": {TWO_ROUNDS: 2},
    "foura": {TWO_ROUNDS: 2},
    "lora attention": {TWO_ROUNDS: 2},
}
"""Family -> closed-form fusions in several rounds; in cells of their own."""
MOST_WEIGHTS = 7  # that are tried for a sum
DISTILLED = "closed-form, distilled"
DISTILLATIONS: Mapping[str, tuple[str, ...]] = {
    "lora": (DISTILLED, f"{DISTILLED} without preserving"),
    "spectral_a same columns": (DISTILLED,),
    "spectral_a own columns": (DISTILLED,),
    "foura": (DISTILLED,),
    "lora attention": (DISTILLED,),
}
"""Family -> with and without prompts that shall stay as they are; in cells of their own."""


def cell_name(family: str, seed: int | str) -> str:
    return f"fusing__{family.replace(' ', '_')}__{seed}"


def rounds_name(family: str, seed: int | str) -> str:
    return f"fusing_rounds__{family.replace(' ', '_')}__{seed}"


def distilled_name(family: str, seed: int | str) -> str:
    return f"fusing_distilled__{family.replace(' ', '_')}__{seed}"


def cells(lab: Lab) -> list[tuple[str, Callable[[], Mapping[str, Any]]]]:
    """Every family with every seed, seed after seed."""
    found: list[tuple[str, Callable[[], Mapping[str, Any]]]] = []
    for seed in lab.setting.seeds:
        for family in FAMILIES:
            found.append((cell_name(family, seed), lambda f=family, s=seed: _cell(lab, f, s)))
            if family in ROUNDS:
                found.append((rounds_name(family, seed), lambda f=family, s=seed: _rounds(lab, f, s)))
            if family in DISTILLATIONS:
                found.append((distilled_name(family, seed), lambda f=family, s=seed: _distilled(lab, f, s)))
    return found


def _concepts(lab: Lab, family: str, seed: int) -> list[Adapter]:
    """An adapter for each concept, each at the rate of its recipe."""
    recipe_of, _ = FAMILIES[family]
    steps, found = lab.setting.steps, []
    for place, name in enumerate(NAMES):
        recipe = recipe_of(place)
        rate = lab.rate("character", recipe)
        found.append(lab.trained(Task("character", name), recipe, rate, seed)[steps].adapter)
    return found


def _strips(lab: Lab, family: str, seed: int) -> str:
    """How the strips of a family's pictures begin; nothing but for the first seed's."""
    return cell_name(family, "") if seed == lab.setting.seeds[0] else ""


def _read(meter: CharacterMeter, fused: Fused, strips: str) -> dict[str, Any]:
    """What is on the fused adapter's pictures. strips: how the names of the kept ones begin."""
    return {
        "concepts": {
            name: meter.read(name, [fused.adapter], strips and f"{strips}__{name}") for name in NAMES
        },
        **meter.unrelated([fused.adapter]),
        "together": meter.together([fused.adapter]),
        "retention": [concept.retention for concept in fused.report.concepts],
    }


def _cell(lab: Lab, family: str, seed: int) -> dict[str, Any]:
    fusions = FAMILIES[family][1]
    adapters = _concepts(lab, family, seed)
    meter = CharacterMeter(lab, NAMES)
    shown = _strips(lab, family, seed)
    recipe_of, _ = FAMILIES[family]
    rates = [lab.rate("character", recipe_of(place)) for place in range(len(NAMES))]
    alone = {
        name: meter.read(name, [adapter], shown and f"{shown}alone__{name}")
        for name, adapter in zip(NAMES, adapters, strict=True)
    }
    found: dict[str, Any] = {"rates": rates, "alone": {"concepts": alone}}
    if seed == lab.setting.seeds[0]:
        found["base"] = {"similarity": _base(lab, meter)}
    places = range(len(NAMES))
    statistics = [_statistics(lab, adapters, place, 1.0) for place in places]
    for fusion in fusions:
        seen = statistics
        if fusion == GUIDED:
            seen = [_statistics(lab, adapters, place, GUIDANCE) for place in places]
        if fusion == RETAKEN:
            first = fuse(adapters, "closed-form", statistics=statistics).adapter
            seen = [_statistics(lab, adapters, place, 1.0, first) for place in places]
        weight = _best_weight(meter, adapters) if fusion == TUNED else None
        weights = None if weight is None else [weight] * len(adapters)
        fused = fuse(adapters, fusion.split(",")[0], weights=weights, statistics=seen)
        found[fusion] = _read(meter, fused, shown and f"{shown}{fusion}")
        if weight is not None:
            found[fusion]["weight"] = weight
    apart = [meter.unrelated([a]) for a in adapters]
    found["alone"] |= {key: fmean(one[key] for one in apart) for key in ("drift", "leak")}
    return found


def _best_weight(meter: CharacterMeter, adapters: Sequence[Adapter]) -> float:
    """The one weight of all adapters with which their sum draws each best under the fitted wordings; steps of
    √3 from the average's, until the best is inside."""

    def certainty(step: int) -> float:
        weights = [_weight(step, adapters)] * len(adapters)
        fused = fuse(adapters, "sum", weights=weights).adapter
        return fmean(meter.certainty(name, [fused]) for name in meter.names)

    known = {step: certainty(step) for step in (0, 1, 2)}
    while len(known) < MOST_WEIGHTS:
        best = max(known, key=lambda step: known[step])
        if min(known) < best < max(known):
            break
        step = best - 1 if best == min(known) else best + 1
        known[step] = certainty(step)
    return _weight(max(known, key=lambda step: known[step]), adapters)


def _weight(step: int, adapters: Sequence[Adapter]) -> float:
    return 3 ** (step / 2) / len(adapters)


def _rounds(lab: Lab, family: str, seed: int) -> dict[str, Any]:
    """Fusions that look again at what they have fused."""
    adapters = _concepts(lab, family, seed)
    meter = CharacterMeter(lab, NAMES)
    shown = _strips(lab, family, seed)

    def look(under: Adapter | None) -> list[Mapping[str, Statistics]]:
        return [_statistics(lab, adapters, place, 1.0, under) for place in range(len(NAMES))]

    def once(seen: Sequence[Mapping[str, Statistics]]) -> Fused:
        return fuse(adapters, "closed-form", statistics=seen)

    return {
        fusion: _read(meter, fuse_in_rounds(look, once, rounds).fused, shown and f"{shown}{fusion}")
        for fusion, rounds in ROUNDS[family].items()
    }


def _distilled(lab: Lab, family: str, seed: int) -> dict[str, Any]:
    """Fusions that are trained further. The scenes to be preserved are of the kinds that the model was
    trained on; those of the drift are held out."""
    adapters = _concepts(lab, family, seed)
    meter = CharacterMeter(lab, NAMES)
    shown, settings = _strips(lab, family, seed), lab.setting
    statistics = [_statistics(lab, adapters, place, 1.0) for place in range(len(NAMES))]
    first = fuse(adapters, "closed-form", statistics=statistics)
    rng = np.random.default_rng(1000 + seed)
    scenes = tuple(draw.full_caption(draw.random_scene(rng)) for _ in range(settings.distil_samples))
    prompts = [_prompts(name) for name in NAMES]
    config = replace(DISTIL, steps=settings.distil_steps, batch_size=BATCH, seed=seed)
    found = {}
    for fusion in DISTILLATIONS[family]:
        job = DistilJob(
            samples=settings.distil_samples,
            preserve=scenes if fusion == DISTILLED else (),
            sample_steps=settings.sampler_steps,
            guidance=GUIDANCE,
            size=SIZE,
        )
        started = time.process_time()
        with TemporaryDirectory() as folder:
            output = Output(Path(folder), "distilled", checkpoint_every=0)
            done = distil(lab.pipe, first.adapter, adapters, prompts, job, config, output)
        seconds = time.process_time() - started
        read = _read(meter, replace(first, adapter=done.adapter), shown and f"{shown}{fusion}")
        found[fusion] = {**read, "retention": None, "seconds": seconds}
    return found


def _prompts(name: str) -> list[str]:
    return [FITTED.format(name, background) for background in BACKGROUNDS]


def _base(lab: Lab, meter: CharacterMeter) -> dict[str, float]:
    """The base model's own score: the concept's word means nothing there."""
    return {name: meter.read(name, [])["fidelity"] for name in NAMES}


def _statistics(
    lab: Lab, adapters: Sequence[Adapter], place: int, guidance: float, under: Adapter | None = None
) -> Mapping[str, Statistics]:
    """What the layers get when a concept is drawn with its own adapter, or ``under`` another. With guidance,
    half of what is seen are the empty prompt's rows, the same for every concept."""
    prompts = _prompts(NAMES[place])
    modules = modules_of(lab.pipe.unet, adapters, "unet")
    with apply(lab.pipe, under or adapters[place]), collect(modules, adapters, dtype=torch.float64) as seen:
        generate(
            lab.pipe,
            prompts,
            [100 + i for i in range(len(prompts))],
            steps=lab.setting.sampler_steps,
            guidance=guidance,
            size=SIZE,
            batch_size=len(prompts),
        )
    return seen.statistics()
