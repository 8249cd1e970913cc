"""That every method learns, by steps, as a table and verdicts."""

from __future__ import annotations

from typing import Any

from PIL import Image

from benchmarks.claims.figures import Figures, part, table
from benchmarks.claims.learning import RECIPES, cell_name
from demo_model.draw import PIXELS
from spectral_core.plots import contact_sheet, line_plot

KINDS = {"character": "drawn character", "photos": "photographs"}
NAMES = ("LoRA", "FouRA", "Spectral A", "Spectral R")
LABELS = dict(zip((recipe.name for recipe in RECIPES), NAMES, strict=True))


def learning(figures: Figures) -> dict[str, Any]:
    """Similarity to the concept's own pictures by steps, with the base model as step 0."""
    steps = [0, *figures.lab.setting.learning_steps]
    rows, series, verdicts = [], {}, []
    for kind, what in KINDS.items():
        for recipe, label in LABELS.items():
            name = cell_name(kind, recipe, "{seed}")
            at = [figures.mean(name, lambda c, s=s: c[str(s)]["similarity"]) for s in steps]
            rows.append([what, label, *(m.text(2) for m in at)])
            if kind == "character":
                sure = [figures.mean(name, lambda c, s=s: c[str(s)]["fidelity"]) for s in steps]
                rows.append([f"{what}, judge's certainty", label, *(m.text(2) for m in sure)])
            if at[0].values:
                series[f"{label}, {what}"] = (steps, [m.mean for m in at])
            last = str(steps[-1])
            gain = figures.mean(name, lambda c, e=last: c[e]["similarity"] - c["0"]["similarity"])
            verdicts.append((f"{label}, {what}", gain))
    return {
        "claim": "Every method learns a concept",
        "paper": "–",
        "parts": [
            part(f"similarity gained, {what}", gain, 2, detail=KINDS["photos"] in what)
            for what, gain in verdicts
        ],
        "cells": [cell_name("character", RECIPES[1].name, "{seed}")],
        "experiment": "learning",
        "table": table(["concept", "method", *(f"{s} steps" for s in steps)], rows),
        "picture": _picture(figures, series),
    }


def _picture(figures: Figures, series: dict[str, Any]) -> Image.Image | None:
    """The curves over the first seed's last pictures of the character for each method; what was learned from
    somebody's photographs is not shown."""
    if not series:
        return None
    plot = line_plot(series, "steps", "similarity to the concept's own pictures", "What is learned, by steps")
    rows, labels = [], []
    for recipe, label in LABELS.items():
        strip = figures.lab.strip(f"learning__character__{recipe.replace(' ', '_')}")
        if strip:
            rows.append(strip[:: max(1, len(strip) // 8)][:8])
            labels.append(label)
    if not rows:
        return plot
    sheet = contact_sheet(rows, labels, cell=PIXELS)
    both = Image.new("RGB", (max(plot.width, sheet.width), plot.height + sheet.height), "white")
    both.paste(plot, (0, 0))
    both.paste(sheet, (0, plot.height))
    return both


CLAIMS = (learning,)
