"""The Spectral Adapter's claims, and both methods' costs, as tables and verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from benchmarks.claims.capacity import BUDGETS
from benchmarks.claims.figures import NOT_RUN, OPEN, OPPOSITE, SHOWS, Figures, Mean, Part, few, part, table
from benchmarks.claims.fusing import (
    DISTILLED,
    FAMILIES,
    NAMES,
    ROUNDS,
    TUNED,
    TWO_ROUNDS,
    cell_name,
    distilled_name,
    rounds_name,
)
from benchmarks.claims.recipes import COLUMNS, RANK, lora
from benchmarks.claims.styles import STYLE
from benchmarks.common import RESULTS
from demo_model.draw import PIXELS
from spectral_core.plots import contact_sheet, line_plot

KEPT = 0.9  # of each concept's own score
ENOUGH = 0.8  # of LoRA's gain, with fewer parameters
LEAST_LORA = 44_544  # parameters of rank 1 on all layers of the embedded model
LORA = "lora"
CLOSED_FORM = "closed-form"


def _learned(recipe: str) -> str:
    return f"learned__{recipe.replace(' ', '_')}__{{seed}}"


def columns(figures: Figures) -> dict[str, Any]:
    """Which columns learn most, by the loss on pictures never seen."""

    def gain(cell: Mapping[str, Any]) -> float:
        return 1 - float(cell["held_out"]) / float(cell["before"])

    places = {place: _learned(recipe.name) for place, recipe in COLUMNS.items()}
    rows = []
    for label, name in [*((f"Spectral A, {p}", n) for p, n in places.items()), ("LoRA", _learned(LORA))]:
        read = [figures.mean(name, gain).text()] + [
            figures.mean(name, lambda c, k=k: c[k]).text(2) for k in (STYLE, "right", "diversity")
        ]
        rates = {cell["rate"] for cell in figures.cells(name).values()}
        rows.append([label, *read, ", ".join(f"{r:g}" for r in sorted(rates))])
    over_lora = figures.difference(places["top"], _learned(LORA), gain)
    over_bottom = figures.difference(places["top"], places["bottom"], gain)
    under_lora = figures.difference(_learned(LORA), places["bottom"], gain)
    return {
        "claim": "Spectral A: top columns learn more than LoRA, LoRA more than bottom columns",
        "paper": "GLUE 89.56 against 87.70, GSM8K 51.1 against 46.25",
        "parts": [
            part("loss taken, top − LoRA", over_lora),
            part("loss taken, LoRA − bottom", under_lora),
            part("loss taken, top − bottom", over_bottom),
        ],
        "cells": [*places.values(), _learned(LORA)],
        "experiment": "columns",
        "table": table(["columns", "decrease of held-out loss", "style", "right", "diversity", "rate"], rows),
        "picture": None,
    }


def budgets(figures: Figures) -> dict[str, Any]:
    """What few parameters can learn."""

    def gain(cell: Mapping[str, Any]) -> float:
        return 1 - float(cell["held_out"]) / float(cell["before"])

    rows, points = [], {"Spectral R": [], "LoRA": []}
    for recipe in BUDGETS:
        name = _learned(recipe.name)
        cells = list(figures.cells(name).values())
        if not cells:
            continue
        parameters, mean = cells[0]["parameters"], figures.mean(name, gain)
        points["LoRA" if recipe.name.startswith(LORA) else "Spectral R"].append((parameters, mean.mean))
        style = figures.mean(name, lambda c: c[STYLE])
        rows.append([recipe.name, f"{parameters:,}", mean.text(), style.text(2), f"{cells[0]['rate']:g}"])
    smallest = figures.mean(_learned(lora(1).name), gain)
    parts = []
    for recipe in BUDGETS[:2]:
        name = _learned(recipe.name)
        cells = list(figures.cells(name).values())
        of = cells[0]["parameters"] / LEAST_LORA if cells else math.nan
        rotated = figures.mean(name, gain)
        less = figures.difference(name, _learned(lora(1).name), gain)
        what = f"loss taken with 1/{1 / of:.0f} of rank 1's parameters" if cells else recipe.name
        parts.append(Part(what, rotated.text(), less.seen(), _budget_verdict(rotated, smallest)))
    series = {name: tuple(zip(*sorted(line), strict=True)) for name, line in points.items() if line}
    return {
        "claim": "Spectral R learns a concept from far fewer parameters than LoRA's smallest",
        "paper": "1k to 20k parameters where LoRA starts at 273k",
        "parts": [*parts, Part("loss taken by LoRA of rank 1", smallest.text())],
        "cells": [_learned(recipe.name) for recipe in BUDGETS],
        "experiment": "budgets",
        "table": table(["adapter", "parameters", "decrease of held-out loss", "style at 1", "rate"], rows),
        "picture": line_plot(
            series, "trained parameters", "decrease of held-out loss", "What parameters buy", log_x=True
        )
        if series
        else None,
    }


def _budget_verdict(rotated: Mean, smallest: Mean) -> str:
    """Fewer parameters by construction; the claim needs at least four fifths of the gain."""
    if said := few(min(len(rotated.values), len(smallest.values))):
        return said
    share = rotated.mean / smallest.mean
    return f"{SHOWS if share >= ENOUGH else OPEN} ({share:.0%} of rank 1's gain)"


def fusion(figures: Figures) -> dict[str, Any]:
    """Three concepts fused by every method."""
    rows = []
    for family in FAMILIES:
        cells = _cells(figures, family)
        for how in _fusions(family):
            read = {
                key: _mean(cells, lambda c, h=how, k=key: _over_concepts(c, h, k))
                for key in ("fidelity", "crosstalk", "background", "similarity")
            }
            whole = {
                key: _mean(cells, lambda c, h=how, k=key: c[h].get(k) if h in c else None)
                for key in ("drift", "leak", "together")
            }
            least = _mean(cells, lambda c, h=how: _least_kept(c, h)) if how != "alone" else Mean(())
            rows.append(
                [
                    family,
                    how,
                    _rate(cells) if how == "alone" else "",
                    read["fidelity"].text(2),
                    least.text(2),
                    read["crosstalk"].text(2),
                    read["background"].text(2),
                    read["similarity"].text(2),
                    *(mean.text(2) for mean in whole.values()),
                ]
            )
    return {
        "claim": "Fused concepts keep their identities, at once",
        "paper": "better than FedAvg, Orthogonal Adaptation and 10 to 15 minutes of Gradient Fusion",
        "parts": _targets(figures),
        "cells": [cell_name(family, "{seed}") for family in FAMILIES],
        "experiment": "fusing",
        "table": table(
            [
                "adapters",
                "fusion",
                "rate",
                "fidelity",
                "least share kept",
                "crosstalk",
                "background",
                "similarity",
                "drift",
                "leak",
                "two at once",
            ],
            rows,
        ),
        "picture": _sheet(figures),
    }


def _rate(cells: Mapping[int, Mapping[str, Any]]) -> str:
    """Of the first seed that says so."""
    said = [cell["rate"] for cell in cells.values() if "rate" in cell]
    return f"{said[0]:g}" if said else "–"


def _fusions(family: str) -> tuple[str, ...]:
    return "alone", *FAMILIES[family][1], *((TWO_ROUNDS, DISTILLED) if family in ROUNDS else ())


def _cells(figures: Figures, family: str) -> dict[int, dict[str, Any]]:
    """Seed -> how it was fused -> what is on the pictures."""
    first, *later = (figures.cells(of(family, "{seed}")) for of in (cell_name, rounds_name, distilled_name))
    return {
        seed: {**cell, **{k: v for c in later for k, v in c.get(seed, {}).items()}}
        for seed, cell in first.items()
    }


def _mean(cells: Mapping[int, Mapping[str, Any]], read: Callable[[Mapping[str, Any]], float | None]) -> Mean:
    """Over the seeds that were fused so."""
    return Mean(tuple(v for v in map(read, cells.values()) if v is not None))


def _sheet(figures: Figures) -> Image.Image | None:
    """Three concepts, four pictures each, alone and fused by every method; the first seed's."""
    rows, labels = [], []
    for family in FAMILIES:
        for how in _fusions(family):
            strips = [figures.lab.strip(f"{cell_name(family, '')}{how}__{name}") for name in NAMES]
            if all(strips):
                rows.append(
                    [picture for strip in strips for picture in strip[:: max(1, len(strip) // 4)][:4]]
                )
                labels.append(f"{family}: {how}")
    return contact_sheet(rows, labels, cell=PIXELS) if rows else None


def _kept(cell: Mapping[str, Any], how: str) -> list[float]:
    """Each concept's fidelity, fused over alone."""
    alone, fused = cell["alone"]["concepts"], cell[how]["concepts"]
    return [fused[n]["fidelity"] / max(alone[n]["fidelity"], 1e-6) for n in NAMES]


def _over_concepts(cell: Mapping[str, Any], how: str, key: str) -> float | None:
    """The mean over the concepts; None where this seed was not fused so."""
    return fmean(v[key] for v in cell[how]["concepts"].values()) if how in cell else None


def _least_kept(cell: Mapping[str, Any], how: str) -> float | None:
    """None as above."""
    return min(_kept(cell, how)) if how in cell else None


def _number(cell: Mapping[str, Any], how: str, key: str) -> float | None:
    if key == "together":
        return cell[how].get(key) if how in cell else None
    return _over_concepts(cell, how, key)


def _targets(figures: Figures) -> list[Part]:
    """What the comparison was made for; first the paper's own, fusion in own columns against the others."""
    every = {family: _cells(figures, family) for family in FAMILIES}
    spectral = ("spectral_a own columns", "spectral")
    found = [
        _gain(every, spectral, ("lora", "average"), "Spectral A in own columns − average of LoRAs"),
        _gain(
            every, spectral, ("orthogonal", "orthogonal"), "Spectral A in own columns − Orthogonal Adaptation"
        ),
        _gain(every, spectral, ("lora", "gradient"), "Spectral A in own columns − gradient fusion of LoRAs"),
        *(
            _gain(every, ours, theirs, what, key="together")
            for ours, theirs, what in (
                (spectral, ("lora", "average"), "Spectral A in own columns − average of LoRAs"),
                (("lora", DISTILLED), spectral, "distilled LoRAs − Spectral A in own columns"),
            )
        ),
        _all_kept(every, "lora", CLOSED_FORM),
        _all_kept(every, "lora", DISTILLED),
    ]
    for how in (CLOSED_FORM, DISTILLED):
        for family in ("foura", "spectral_a same columns", "spectral_a own columns"):
            found.append(replace(_all_kept(every, family, how), detail=True))
    for family, others in (
        ("lora", ("average", TUNED, "subspaces", "sum")),
        ("foura", ("average", TUNED, "sum")),
    ):
        for other in others:
            what = f"{CLOSED_FORM} − {other} ({family})"
            found.append(_gain(every, (family, CLOSED_FORM), (family, other), what, True))
    orthogonal = ("orthogonal", "orthogonal")
    what = f"{CLOSED_FORM} (lora) − Orthogonal Adaptation"
    found.append(_gain(every, ("lora", CLOSED_FORM), orthogonal, what, True))
    for better in (TWO_ROUNDS, DISTILLED):
        what = f"{better} − {CLOSED_FORM} (lora)"
        found.append(_gain(every, ("lora", better), ("lora", CLOSED_FORM), what, True))
    own, same = (f"spectral_a {kind} columns" for kind in ("own", "same"))
    for ours, theirs in (("spectral", "sum"), *((how, how) for how in (CLOSED_FORM, TWO_ROUNDS, DISTILLED))):
        found.append(_gain(every, (own, ours), (same, theirs), f"own − same columns, {ours}", True))
    return found


Cells = Mapping[str, Mapping[int, Mapping[str, Any]]]


def _gain(
    every: Cells,
    ours: tuple[str, str],
    theirs: tuple[str, str],
    what: str,
    detail: bool = False,
    key: str = "fidelity",
) -> Part:
    """Fidelity (or both at once) of one (family, fusion) less another's, seed by seed."""
    one, other = every[ours[0]], every[theirs[0]]
    pairs = [(_number(one[s], ours[1], key), _number(other[s], theirs[1], key)) for s in one if s in other]
    gain = Mean(tuple(a - b for a, b in pairs if a is not None and b is not None))
    return part(f"{'two at once' if key == 'together' else key}, {what}", gain, 2, detail=detail)


def _all_kept(every: Cells, family: str, how: str) -> Part:
    """Each concept's fidelity over its own adapter's, the mean over the seeds."""
    cells = [cell for cell in every[family].values() if how in cell]
    each = [fmean(column) for column in zip(*(_kept(c, how) for c in cells), strict=True)]
    text = ", ".join(f"{n} {v:.2f}" for n, v in zip(NAMES, each, strict=False))
    held = few(len(cells)) or ("holds" if min(each) >= KEPT else "does not hold")
    return Part(f"{how} keeps {KEPT:.0%} of each ({family})", text, "–", held)


def capacity(figures: Figures) -> dict[str, Any]:
    """Rank of the update."""
    exact = figures.lab.known("exact")
    ranks = exact["rank_capacity"] if exact else {}
    holds = bool(ranks) and ranks["lora"] == [RANK, RANK] and ranks["spectral_a"] == [2 * RANK, 2 * RANK]
    return {
        "claim": "Spectral A of r columns reaches rank 2r, LoRA of the same size r",
        "paper": "lemma",
        "parts": [
            Part(
                f"ranks at r = {RANK}",
                str(ranks),
                "exact",
                SHOWS if holds else NOT_RUN if not ranks else OPPOSITE,
            )
        ],
        "cells": [],
        "experiment": "exact",
        "table": "",
        "picture": None,
    }


def rotation(figures: Figures) -> dict[str, Any]:
    """Singular values under Cayley rotation."""
    exact = figures.lab.known("exact")
    change = exact["rotation"]["largest_change"] if exact else float("nan")
    return {
        "claim": "Rotating singular vectors keeps the singular values",
        "paper": "lemma",
        "parts": [
            Part(
                "largest relative change",
                f"{change:.1e}",
                "1e-5",
                NOT_RUN if not exact else SHOWS if change < 1e-5 else OPPOSITE,
            )
        ],
        "cells": [],
        "experiment": "exact",
        "table": "",
        "picture": None,
    }


def cost(figures: Figures) -> dict[str, Any]:
    """Time and memory over LoRA, and what gates cost: from the benchmarks of layers and of the network."""
    rows = []
    found: dict[str, float] = {}
    for name in ("layers", "unet"):
        path = RESULTS / f"{name}.json"
        if path.exists():
            for target in json.loads(path.read_text(encoding="utf-8"))["targets"]:
                found[target["name"]] = target["figure"]
                held = "yes" if target["holds"] else "no"
                rows.append(
                    [target["name"], f"{target['figure']:.3g}", f"{target['op']} {target['limit']:g}", held]
                )
    parts = []
    for what in ("step time", "peak memory"):
        if (figure := found.get(f"spectral a: {what} / peft lora")) is not None:
            held = SHOWS if figure <= 1.05 else OPPOSITE
            parts.append(Part(f"Spectral A, {what} / LoRA's", f"{figure:.3f}", "–", held))
    gates = figures.lab.known("cost")
    if gates is not None:
        share = gates["gates"]["64"] / gates["base"]
        held = SHOWS if share <= 3e-4 else OPPOSITE
        parts.append(Part("gates of rank 64 / SD 1.5's parameters", f"{share:.3%}", "exact", held))
    parts += frozen_saves(RESULTS / "layers.json")
    return {
        "claim": "Negligible runtime and memory over LoRA (Spectral A), and +0.02 % parameters (FouRA)",
        "paper": "bar charts; frozen gates halve FouRA's cost",
        "parts": parts,
        "cells": [],
        "experiment": "cost",
        "table": table(["figure", "measured", "wanted", "holds"], rows),
        "picture": None,
    }


def frozen_saves(path: Path) -> list[Part]:
    """How much of what adaptive FouRA adds to a layer's time is left with frozen gates, for each size."""
    if not path.exists():
        return []
    added: dict[tuple[str, int], dict[str, float]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if row["rank"] == 64:
            added.setdefault((row["pass"], row["size"]), {})[row["name"]] = row["ratio"] - 1
    parts = []
    for what in dict.fromkeys(kind for kind, _ in added):
        left = [
            sizes["foura dct frozen"] / sizes["foura dct adaptive"]
            for (kind, _), sizes in added.items()
            if kind == what and {"foura dct frozen", "foura dct adaptive"} <= set(sizes)
        ]
        if left:
            text = " to ".join(dict.fromkeys(f"{v:.0%}" for v in (min(left), max(left))))
            held = SHOWS if max(left) <= 0.55 else OPEN
            parts.append(Part(f"time added with frozen gates / adaptive, {what}", text, "–", held))
    return parts


CLAIMS = (fusion, columns, budgets, capacity, rotation, cost)
