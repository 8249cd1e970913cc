"""FouRA's claims about styles: diversity at matched strength, the ablation, merging, gates, spectra and
copying.

Every adapter learns the style ``poster`` from thirty drawings at the rate of its own sweep. ``frozen``
variants are the adaptive adapters with the masks of their training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

from benchmarks.claims.lab import Lab, Recipe, Task
from benchmarks.claims.measure import StyleMeter
from benchmarks.claims.recipes import ABLATION, RANK, foura, lora
from spectral_core.adapter.adapter import Adapter
from spectral_core.analysis.spectra import layer_spectra
from spectral_core.fusion import freeze
from spectral_core.gates.record import GateRecorder

Cells = list[tuple[str, Callable[[], Mapping[str, Any]]]]
STYLE, OTHER = "poster", "inked"
MERGED = (lora(RANK), foura("dct", "adaptive"))
SPARE_RANK = 32
STEP_BINS = 5


def style_cell(recipe: Recipe, seed: int) -> str:
    return f"style__{recipe.name.replace(' ', '_')}__{seed}"


def _adapter(lab: Lab, recipe: Recipe, seed: int, style: str = STYLE) -> Adapter:
    run = lab.trained(Task("style", style), recipe, lab.rate("style", recipe), seed)
    return run[lab.setting.steps].adapter


def style_cells(lab: Lab) -> Cells:
    """The ablation's recipes: metrics at every strength, also with frozen gates."""
    base: Cells = [("style__base", lambda: StyleMeter(lab, STYLE).read(StyleMeter(lab, STYLE).pictures([])))]
    return base + [
        (style_cell(recipe, seed), lambda recipe=recipe, seed=seed: _style(lab, recipe, seed))
        for seed in lab.setting.seeds
        for recipe in ABLATION.values()
    ]


def _style(lab: Lab, recipe: Recipe, seed: int) -> dict[str, Any]:
    rate = lab.rate("style", recipe)
    run = lab.trained(Task("style", STYLE), recipe, rate, seed)[lab.setting.steps]
    meter, adapter = StyleMeter(lab, STYLE), run.adapter
    found: dict[str, Any] = {"rate": rate, "held_out": run.held_out, "before": run.held_out_before}
    variants = {"": adapter} | ({} if adapter.mergeable else {" frozen": freeze(adapter)})
    for variant, used in variants.items():
        for strength in (1.0,) if variant else lab.setting.strengths:
            pictures = meter.pictures([replace(used, strength=strength)])
            read = meter.read(pictures)
            read["copied"] = meter.copied(pictures, seed, lab.setting.pictures)
            found[f"strength {strength:g}{variant}"] = read
            if seed == lab.setting.seeds[0] and strength == 1 and not variant:
                lab.keep_strip(f"style__{recipe.name.replace(' ', '_')}", pictures[:12])
    found["spectrum"] = _spectrum(adapter)
    return found


def _spectrum(adapter: Adapter) -> dict[str, float]:
    """Effective and stable rank of ΔW without its gates, mean over layers."""
    spectra = layer_spectra(adapter).values()
    return {
        "effective_rank": fmean(s.effective_rank for s in spectra),
        "stable_rank": fmean(s.stable_rank for s in spectra),
    }


def merging_cells(lab: Lab) -> Cells:
    """Two styles at once, each adapter at the same strength."""
    return [
        (f"merging__{recipe.name.replace(' ', '_')}__{seed}", lambda r=recipe, s=seed: _merging(lab, r, s))
        for seed in lab.setting.seeds
        for recipe in MERGED
    ]


def _merging(lab: Lab, recipe: Recipe, seed: int) -> dict[str, Any]:
    pair = [_adapter(lab, recipe, seed, style) for style in (STYLE, OTHER)]
    meter = StyleMeter(lab, STYLE)
    found: dict[str, Any] = {}
    rate = lab.rate("style", recipe)
    for strength in lab.setting.merged_strengths:
        pictures = meter.pictures([replace(a, strength=strength) for a in pair], f"{STYLE} {OTHER}")
        found[f"strength {strength:g}"] = meter.read(pictures)
        if seed == lab.setting.seeds[0] and strength == 1:
            lab.keep_strip(f"merging__{recipe.name.replace(' ', '_')}", pictures[:12])
        if _past_best([read["both"] for read in found.values()]):
            break
    return found | {"rate": rate}


def _past_best(both: list[float]) -> bool:
    """Whether the two largest strengths so far are worse than one before."""
    return len(both) > 2 and max(both) > max(both[-2:])


def gate_cells(lab: Lab) -> Cells:
    """Open gates by layer and denoising step, at the needed rank and with spare rank."""
    return [
        (f"gates__{rank}__{seed}", lambda rank=rank, seed=seed: _gates(lab, rank, seed))
        for seed in lab.setting.seeds
        for rank in (RANK, SPARE_RANK)
    ]


def _gates(lab: Lab, rank: int, seed: int) -> dict[str, Any]:
    recipe = foura("dct", "adaptive", rank)
    adapter = _adapter(lab, recipe, seed)
    recorder, meter = GateRecorder(STEP_BINS), StyleMeter(lab, STYLE)
    prompts = meter.prompts(STYLE)
    lab.draw(prompts, [7000 + i for i in range(len(prompts))], [adapter], recorder)
    return {"rate": lab.rate("style", recipe), "gates": recorder.summary()}


def copying_cells(lab: Lab) -> Cells:
    """A style from few pictures, trained long: how many samples copy one."""
    return [
        (f"copying__{recipe.name.replace(' ', '_')}__{seed}", lambda r=recipe, s=seed: _copying(lab, r, s))
        for seed in lab.setting.seeds
        for recipe in MERGED
    ]


def _copying(lab: Lab, recipe: Recipe, seed: int) -> dict[str, Any]:
    settings, meter = lab.setting, StyleMeter(lab, STYLE)
    rate = lab.rate("style", recipe)
    runs = lab.trained(
        Task("style", STYLE),
        recipe,
        rate,
        seed,
        pictures=settings.few_pictures,
        snapshots=settings.long_steps,
    )
    found: dict[str, Any] = {"rate": rate}
    for step, run in runs.items():
        pictures = meter.pictures([run.adapter])
        copied = meter.copied(pictures, seed, settings.few_pictures)
        found[str(step)] = meter.read(pictures) | {"copied": copied, "held_out": run.held_out}
    return found
