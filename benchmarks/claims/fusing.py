"""Three concepts in one model: which adapters and which fusion keep them apart.

The task, fixed before any method was run: the characters bot, fish and imp (the bot recoloured and upside
down), trained apart on pictures whose captions share every word but the name; LoRA, FouRA and Spectral A of
one size, the Spectral ones once all in the top columns and once in columns of their own; fused at strength
1; every method at the rate of its own sweep (for the concept at the first place), over several seeds.
Statistics are those of four generations per concept, without guidance.

``lora attention`` was added when closed-form was seen not to keep all of the concepts: adapters on the
attention layers alone, as in the papers, and statistics collected a second time under what was fused first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.claims.lab import GUIDANCE, Lab, Recipe, Task
from benchmarks.claims.measure import CharacterMeter
from benchmarks.claims.recipes import RANK, attention_lora, block, foura, lora, orthogonal
from spectral_core.adapter import Adapter
from spectral_core.cli.demo_concepts import BACKGROUNDS
from spectral_core.collect import collect, modules_of
from spectral_core.fusion import fuse
from spectral_core.moments import Statistics
from spectral_core.pipelines import apply, generate

NAMES = ("bot", "fish", "imp")
GUIDED = "closed-form, statistics under guidance"
RETAKEN = "closed-form, statistics of the fused model"
SLOW = ("closed-form-rank", "gradient")  # references, over the first two seeds

FAMILIES: Mapping[str, tuple[Callable[[int], Recipe], tuple[str, ...]]] = {
    "lora": (
        lambda _: lora(RANK),
        ("sum", "average", "subspaces", "closed-form", GUIDED, "closed-form-rank", "gradient"),
    ),
    "spectral_a same columns": (lambda _: block(0), ("sum", "spectral", "average", "closed-form")),
    "spectral_a own columns": (block, ("spectral", "average", "closed-form")),
    "orthogonal": (orthogonal, ("orthogonal", "average", "closed-form")),
    "foura": (lambda _: foura("dct", "adaptive"), ("sum", "average", "closed-form")),
    "lora attention": (lambda _: attention_lora(), ("sum", "average", "closed-form", RETAKEN)),
}
"""Family -> the recipe of the concept at each place, and its fusions."""
FEWER = {"foura": 2, "lora attention": 3}  # seeds


def cell_name(family: str, seed: int) -> str:
    return f"fusing__{family.replace(' ', '_')}__{seed}"


def cells(lab: Lab) -> list[tuple[str, Callable[[], Mapping[str, Any]]]]:
    """Every family with every seed, seed after seed."""
    return [
        (cell_name(family, seed), lambda family=family, seed=seed: _cell(lab, family, seed))
        for seed in lab.setting.seeds
        for family in FAMILIES
        if seed in lab.setting.seeds[: FEWER.get(family, len(lab.setting.seeds))]
    ]


def _cell(lab: Lab, family: str, seed: int) -> dict[str, Any]:
    recipe_of, fusions = FAMILIES[family]
    adapters = []
    rate = lab.rate("character", recipe_of(0))
    for place, name in enumerate(NAMES):
        run = lab.trained(Task("character", name), recipe_of(place), rate, seed)
        adapters.append(run[lab.setting.steps].adapter)
    meter = CharacterMeter(lab, NAMES)
    shown = f"fusing__{family.replace(' ', '_')}__" if seed == lab.setting.seeds[0] else ""
    alone = {
        name: meter.read(name, [adapter], shown and f"{shown}alone__{name}")
        for name, adapter in zip(NAMES, adapters, strict=True)
    }
    found: dict[str, Any] = {"alone": {"concepts": alone}}
    if seed == lab.setting.seeds[0]:
        found["base"] = {"similarity": _base(lab, meter)}
    places = range(len(NAMES))
    statistics = [_statistics(lab, adapters, place, 1.0) for place in places]
    for fusion in fusions:
        if fusion in SLOW and seed not in lab.setting.seeds[:2]:
            continue
        seen = statistics
        if fusion == GUIDED:
            seen = [_statistics(lab, adapters, place, GUIDANCE) for place in places]
        if fusion == RETAKEN:
            first = fuse(adapters, "closed-form", statistics=statistics).adapter
            seen = [_statistics(lab, adapters, place, 1.0, first) for place in places]
        fused = fuse(adapters, fusion.split(",")[0], statistics=seen)
        found[fusion] = {
            "concepts": {
                name: meter.read(name, [fused.adapter], shown and f"{shown}{fusion}__{name}")
                for name in NAMES
            },
            "drift": meter.drift([fused.adapter]),
            "retention": [concept.retention for concept in fused.report.concepts],
        }
    found["alone"]["drift"] = sum(meter.drift([a]) for a in adapters) / len(adapters)
    return found


def _base(lab: Lab, meter: CharacterMeter) -> dict[str, float]:
    """The base model's own score: the concept's word means nothing there."""
    return {name: meter.read(name, [])["fidelity"] for name in NAMES}


def _statistics(
    lab: Lab, adapters: Sequence[Adapter], place: int, guidance: float, under: Adapter | None = None
) -> Mapping[str, Statistics]:
    """What the layers get when a concept is drawn with its own adapter, or ``under`` another. With guidance,
    half of what is seen are the empty prompt's rows, the same for every concept."""
    prompts = [f"a <{NAMES[place]}> on a {background} background" for background in BACKGROUNDS]
    modules = modules_of(lab.pipe.unet, adapters, "unet")
    with apply(lab.pipe, under or adapters[place]), collect(modules, adapters, dtype=torch.float64) as seen:
        generate(
            lab.pipe,
            prompts,
            [100 + i for i in range(len(prompts))],
            steps=lab.setting.sampler_steps,
            guidance=guidance,
            size=(64, 64),
            batch_size=len(prompts),
        )
    return seen.statistics()
