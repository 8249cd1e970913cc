"""FouRA's claims as tables and verdicts, from the kept cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from benchmarks.claims.figures import OPEN_ENDED, Figures, Mean, interpolated, part, table
from benchmarks.claims.recipes import ABLATION, RANK
from benchmarks.claims.styles import OTHER, SPARE_RANK, STEP_BINS, STYLE
from spectral_core.plots import heatmap, line_plot

LORA, FOURA, DFT = "lora", "foura_dct_adaptive", "foura_dft_adaptive"
LPIPS = 0.06  # the most that the paper gains; a distance of features, too
NAMES: Mapping[str, str] = {
    "lora": "LoRA (no transform, no gate)",
    "foura_none_adaptive": "no transform, adaptive gate",
    "foura_dct_none": "DCT, no gate",
    "foura_dct_adaptive": "DCT, adaptive gate (FouRA)",
    "foura_dft_adaptive": "DFT, adaptive gate",
}
RECIPES = tuple(recipe.name.replace(" ", "_") for recipe in ABLATION.values())


def _curve(
    figures: Figures, cell: Mapping[str, Any], variant: str = ""
) -> list[tuple[float, Mapping[str, float]]]:
    """(strength of the style, everything read there), the base model first."""
    base = figures.lab.known("style__base")
    known = [] if base is None else [base]
    known += [cell[f"strength {s:g}{variant}"] for s in figures.lab.setting.strengths]
    return [(float(read[STYLE]), read) for read in known]


def _matched(figures: Figures, recipe: str, key: str) -> dict[int, float]:
    """``key`` at the strength of style that LoRA of the same seed has at adapter strength 1."""
    found = {}
    loras = figures.cells(f"style__{LORA}__{{seed}}")
    for seed, cell in figures.cells(f"style__{recipe}__{{seed}}").items():
        if seed not in loras:
            continue
        level = float(loras[seed]["strength 1"][STYLE])
        points = [(x, float(read[key])) for x, read in _curve(figures, cell)]
        value = loras[seed]["strength 1"][key] if recipe == LORA else interpolated(points, level)
        if value is not None:
            found[seed] = float(value)
    return found


def _paired(first: Mapping[int, float], second: Mapping[int, float]) -> Mean:
    return Mean(tuple(first[s] - second[s] for s in first if s in second))


def diversity(figures: Figures) -> dict[str, Any]:
    """More diverse at the same strength of the style."""
    own, other = _matched(figures, FOURA, "diversity"), _matched(figures, LORA, "diversity")
    gain = _paired(own, other)
    strengths = figures.lab.setting.strengths

    def more(recipe: str, strength: float) -> Mean:
        names = (f"style__{r}__{{seed}}" for r in (recipe, LORA))
        return figures.difference(*names, lambda c: c[f"strength {strength:g}"]["diversity"])

    rows = []
    for recipe in RECIPES:
        name = f"style__{recipe}__{{seed}}"
        at = [figures.mean(name, lambda c, s=s: c[f"strength {s:g}"]["diversity"]) for s in strengths]
        style = figures.mean(name, lambda c: c["strength 1"][STYLE])
        matched = Mean(tuple(_matched(figures, recipe, "diversity").values()))
        right = Mean(tuple(_matched(figures, recipe, "right").values()))
        read = [style.text(2), *(m.text() for m in at), matched.text(), right.text(2)]
        rows.append([NAMES[recipe], figures.rates(name), *read])
    series = {}
    for recipe in RECIPES:
        cells = figures.cells(f"style__{recipe}__{{seed}}").values()
        curves = [_curve(figures, cell) for cell in cells]
        if curves:
            places = range(len(curves[0]))
            series[NAMES[recipe]] = (
                [fmean(c[i][0] for c in curves) for i in places],
                [fmean(c[i][1]["diversity"] for c in curves) for i in places],
            )
    picture = (
        line_plot(series, "strength of the style", "diversity", "Diversity against style") if series else None
    )
    columns = [
        "adapter",
        "rate",
        "style at 1",
        *(f"diversity at {s:g}" for s in strengths),
        "diversity, matched",
        "right, matched",
    ]
    return {
        "claim": "FouRA draws more diverse pictures than LoRA at strengths 0.6 to 1",
        "paper": "+2 to +6 LPIPS points",
        "parts": [
            part("matched diversity, FouRA − LoRA", gain, paper=LPIPS),
            *(
                part(f"diversity at strength {s:g}, {NAMES[recipe]} − LoRA", more(recipe, s), paper=LPIPS)
                for s in strengths[:2]
                for recipe in (FOURA, DFT)
            ),
        ],
        "cells": [f"style__{FOURA}__{{seed}}"],
        "experiment": "styles",
        "table": table(columns, rows),
        "picture": picture,
    }


def ablation(figures: Figures) -> dict[str, Any]:
    """Transform and gate, each with and without the other."""

    def score(cell: Mapping[str, Any], variant: str = "") -> float:
        read = cell[f"strength 1{variant}"]
        return float(read[STYLE] * read["right"])

    rows = []
    for recipe in RECIPES:
        for variant in ("", " frozen") if recipe.endswith("adaptive") else ("",):
            name = f"style__{recipe}__{{seed}}"
            label = (
                NAMES[recipe]
                .replace(" (FouRA)", "")
                .replace("adaptive gate", f"{variant.strip() or 'adaptive'} gate")
            )
            rows.append(
                [
                    label,
                    figures.mean(name, lambda c, v=variant: score(c, v)).text(),
                    figures.mean(name, lambda c, v=variant: c[f"strength 1{v}"]["diversity"]).text(),
                    figures.mean(name, lambda c: c["held_out"]).text(4) if not variant else "",
                ]
            )
    transform = figures.difference("style__foura_dct_none__{seed}", f"style__{LORA}__{{seed}}", score)
    cells = figures.cells(f"style__{FOURA}__{{seed}}").values()
    gate = Mean(tuple(score(c) - score(c, " frozen") for c in cells))
    adaptive = figures.difference("style__foura_none_adaptive__{seed}", f"style__{LORA}__{{seed}}", score)
    level = figures.mean(f"style__{LORA}__{{seed}}", score).mean
    loss = figures.difference(
        f"style__{LORA}__{{seed}}", f"style__{FOURA}__{{seed}}", lambda c: c["held_out"]
    )
    return {
        "claim": "Transform and adaptive gate each add quality",
        "paper": "HPS 28.2 (neither), 28.7 (gate), 30.3 (transform, frozen), 30.6 (both)",
        "parts": [
            part("score, transform − none", transform, paper=level * (30.3 / 28.2 - 1)),
            part("score, gate − none", adaptive, paper=level * (28.7 / 28.2 - 1)),
            part("score, adaptive − frozen", gate, paper=level * (30.6 / 30.3 - 1)),
            part("held-out loss, LoRA − FouRA", loss),
        ],
        "cells": [f"style__{FOURA}__{{seed}}", "style__foura_none_adaptive__{seed}"],
        "experiment": "styles",
        "table": table(
            ["transform and gate", "score (style × right) at 1", "diversity at 1", "held-out loss"], rows
        ),
        "picture": None,
    }


def merging(figures: Figures) -> dict[str, Any]:
    """Two styles added up."""
    rows = []
    for recipe in (LORA, FOURA):
        name = f"merging__{recipe}__{{seed}}"
        for strength in figures.lab.setting.merged_strengths:
            at = f"strength {strength:g}"
            read = [
                figures.mean(name, lambda c, k=k, a=at: c[a][k] if a in c else None)
                for k in ("both", STYLE, OTHER, "right", "diversity")
            ]
            if read[0].values:
                rows.append([NAMES[recipe], figures.rates(name), f"{strength:g}", *(m.text(2) for m in read)])
    names = [f"merging__{recipe}__{{seed}}" for recipe in (FOURA, LORA)]
    gain = figures.difference(*names, lambda cell: best_strength(cell)[1])
    ended = sum(best_strength(c)[2] for name in names for c in figures.cells(name).values())
    kept = part("the weaker style at its best strength, FouRA − LoRA", gain, 2)
    if ended:
        kept = replace(kept, verdict=f"{OPEN_ENDED} ({ended} of {sum(map(len, map(figures.cells, names)))})")
    return {
        "claim": "Two merged FouRA styles keep both better than merged LoRAs",
        "paper": "HPS up to +3 %",
        "parts": [kept],
        "cells": names[:1],
        "experiment": "merging",
        "table": table(["adapters", "rate", "strength", "both", STYLE, OTHER, "right", "diversity"], rows),
        "picture": None,
    }


def best_strength(cell: Mapping[str, Any]) -> tuple[float, float, bool]:
    """The strength at which both styles show most, how much, and whether it is the largest that was tried."""
    tried = {float(k.split()[1]): float(v["both"]) for k, v in cell.items() if k.startswith("strength ")}
    best = max(tried, key=lambda strength: tried[strength])
    return best, tried[best], best == max(tried)


def _resolution(layer: str) -> int:
    """How often the layer's pictures were halved: 0, 1 or 2 in the embedded model."""
    if ".mid_block." in layer or layer.startswith("unet.mid_block"):
        return 2
    block = int(layer.split("blocks.")[1].split(".")[0])
    return block if "down_blocks" in layer else 2 - block


def gates(figures: Figures) -> dict[str, Any]:
    """Open gates by resolution and denoising step."""
    rows, picture = [], None
    by_level: dict[int, list[float]] = {}
    by_step: dict[int, list[float]] = {}
    for rank in (RANK, SPARE_RANK):
        known = figures.cells(f"gates__{rank}__{{seed}}")
        cells = list(known.values())
        if not cells:
            continue
        shares: dict[int, list[list[float]]] = {0: [], 1: [], 2: []}
        for cell in cells:
            found = cell["gates"]
            for layer, ranks, line in zip(
                found["layers"], found["ranks"], found["effective_rank"], strict=True
            ):
                shares[_resolution(layer)].append(
                    [v / ranks if v is not None else float("nan") for v in line]
                )
        means = {
            level: [fmean(line[b] for line in lines) for b in range(STEP_BINS)]
            for level, lines in shares.items()
            if lines
        }
        for level, line in means.items():
            rows.append([str(rank), f"1/{2**level}", *(f"{100 * v:.1f} %" for v in line)])
        for seed, cell in known.items():
            low, high, early, late = _ends(cell["gates"])
            by_level.setdefault(seed, []).append(high - low)
            by_step.setdefault(seed, []).append(early - late)
        picture = heatmap(
            [means[k] for k in sorted(means)],
            row_labels=[f"resolution 1/{2**k}" for k in sorted(means)],
            column_labels=[f"{i + 1}" for i in range(STEP_BINS)],
            title=f"Share of open gates, rank {rank}",
        )
    level, step = (Mean(tuple(fmean(v) for v in found.values())) for found in (by_level, by_step))
    return {
        "claim": "The effective rank is higher at high resolution and falls as denoising goes on",
        "paper": "curves over 20 steps",
        "parts": [
            part("open gates, high − low resolution", level),
            part("open gates, first − last steps", step),
        ],
        "cells": [f"gates__{RANK}__{{seed}}"],
        "experiment": "gates",
        "table": table(
            ["rank", "resolution", *(f"steps {i + 1}/{STEP_BINS}" for i in range(STEP_BINS))], rows
        ),
        "picture": picture,
    }


def _ends(found: Mapping[str, Any]) -> Sequence[float]:
    """Share of open gates: below the highest resolution that has any, there, in the first and in the last
    steps."""
    highest = min(_resolution(layer) for layer in found["layers"])
    low, high, early, late = [], [], [], []
    for layer, rank, line in zip(found["layers"], found["ranks"], found["effective_rank"], strict=True):
        known = [v / rank for v in line if v is not None]
        (high if _resolution(layer) == highest else low).append(fmean(known))
        early.append(known[0])
        late.append(known[-1])
    return fmean(low), fmean(high), fmean(early), fmean(late)


def copying(figures: Figures) -> dict[str, Any]:
    """Copies of training pictures as training goes on."""
    steps = figures.lab.setting.long_steps
    rows = [
        [
            NAMES[recipe],
            figures.rates(f"copying__{recipe}__{{seed}}"),
            str(step),
            *(
                figures.mean(f"copying__{recipe}__{{seed}}", lambda c, k=k, s=step: c[str(s)][k]).text(d)
                for k, d in (("copied", 2), ("diversity", 3), (STYLE, 2), ("right", 2), ("held_out", 4))
            ),
        ]
        for recipe in (LORA, FOURA)
        for step in steps
    ]
    less = figures.difference(
        f"copying__{LORA}__{{seed}}", f"copying__{FOURA}__{{seed}}", lambda c: c[str(steps[-1])]["copied"]
    )
    return {
        "claim": "FouRA copies its training pictures less as training goes on",
        "paper": "figure",
        "parts": [part(f"copies after {steps[-1]} steps, LoRA − FouRA", less, 2)],
        "cells": [f"copying__{FOURA}__{{seed}}"],
        "experiment": "copying",
        "table": table(
            ["adapter", "rate", "steps", "copied", "diversity", "style", "right", "held-out loss"], rows
        ),
        "picture": None,
    }


def spectra(figures: Figures) -> dict[str, Any]:
    """How compact the singular values of the update are."""
    rows = []
    for recipe in RECIPES:
        name = f"style__{recipe}__{{seed}}"
        rows.append(
            [
                NAMES[recipe],
                *(
                    figures.mean(name, lambda c, k=k: c["spectrum"][k]).text(2)
                    for k in ("effective_rank", "stable_rank")
                ),
            ]
        )
    more = figures.difference(
        f"style__{LORA}__{{seed}}", f"style__{FOURA}__{{seed}}", lambda c: c["spectrum"]["effective_rank"]
    )
    return {
        "claim": "FouRA's updates have a more compact spectrum",
        "paper": "one layer's figure",
        "parts": [part("effective rank of ΔW, LoRA − FouRA", more, 2)],
        "cells": [f"style__{FOURA}__{{seed}}"],
        "experiment": "styles",
        "table": table(["adapter", "effective rank of ΔW", "stable rank of ΔW"], rows),
        "picture": None,
    }


CLAIMS = (diversity, merging, ablation, gates, copying, spectra)
