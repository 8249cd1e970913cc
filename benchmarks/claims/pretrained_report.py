"""docs/evidence/pretrained.md from the kept cells: a table for each task, and what the claims' rules say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.claims.figures import FEWEST, Figures, Mean, table
from benchmarks.claims.lab import Lab
from benchmarks.claims.page import DOCS, put
from benchmarks.claims.sentence_methods import METHODS, REFERENCE
from benchmarks.claims.sentences import TASKS

GLUE = 1.86  # points: the paper's mean over GLUE, Spectral A 89.56 and LoRA 87.70
CLAIMS = (
    ("top columns above LoRA", "top", "lora", GLUE),
    ("top columns above bottom ones", "top", "bottom", None),
    ("LoRA above bottom columns", "lora", "bottom", None),
    ("top columns above random ones", "top", "random", None),
    ("top columns above DoRA", "top", "dora", 1.49),
    ("top columns above OFT", "top", "oft", 1.80),
    ("FouRA with its gate above LoRA", "foura_gate", "lora", None),
    ("FouRA's gate above no gate", "foura_gate", "foura", None),
    ("Spectral R above LoRA of rank 1", "spectral_r", "lora_1", None),
    ("Spectral R above VeRA", "spectral_r", "vera", None),
)


BLOCKS = (6, 3)
"""How many blocks are adapted; a task is reported with the most that were run."""


def cell_name(figures: Figures, task: str, method: str) -> str:
    """Of the most adapted blocks that LoRA was run with on three seeds."""
    names = {blocks: f"test__{task}__{blocks}__{{}}__{{{{seed}}}}" for blocks in BLOCKS}
    whole = [b for b, name in names.items() if len(figures.cells(name.format("lora"))) >= FEWEST]
    return names[(whole or BLOCKS)[0]].format(method)


def _points(cell: Mapping[str, Any]) -> float | None:
    return None if cell["loss"] is None else 100 * float(cell["accuracy"])


def _less(cell: Mapping[str, Any]) -> float | None:
    """How much of the head's loss the adapter takes away, in per cent."""
    return None if cell["loss"] is None else 100 * (1 - float(cell["loss"]) / float(cell["head_loss"]))


def difference(figures: Figures, one: str, other: str, read: Any, tasks: tuple[str, ...]) -> Mean:
    """One method less another, seed by seed, the mean over the tasks that both have of that seed."""
    by_seed: dict[int, list[float]] = {}
    for task in tasks:
        first, second = (figures.cells(cell_name(figures, task, method)) for method in (one, other))
        for seed in first:
            if seed in second:
                pair = read(first[seed]), read(second[seed])
                if None not in pair:
                    by_seed.setdefault(seed, []).append(pair[0] - pair[1])
    whole = [values for values in by_seed.values() if len(values) == len(tasks)]
    return Mean(tuple(fmean(values) for values in whole))


def _whole(figures: Figures, task: str, method: str) -> bool:
    return len(figures.cells(cell_name(figures, task, method))) >= FEWEST


def done(figures: Figures) -> tuple[str, ...]:
    """Tasks with LoRA on enough seeds for a verdict."""
    return tuple(t for t in TASKS if _whole(figures, t, "lora"))


def _task(figures: Figures, task: str) -> str:
    rows = []
    head = Mean(
        tuple(100 * c["head_accuracy"] for c in figures.cells(cell_name(figures, task, "lora")).values())
    )
    rows.append(["head alone", "", "", head.text(1), "0", "", ""])
    for name, method in METHODS.items():
        cells = list(figures.cells(cell_name(figures, task, name)).values())
        if not cells:
            continue
        gap = difference(figures, name, REFERENCE[method.budget], _less, (task,))
        own = name == REFERENCE[method.budget]
        opened = f" ({fmean(c['open'] for c in cells):.0%} open)" if "open" in cells[0] else ""
        rows.append(
            [
                method.label + opened,
                f"{cells[0]['parameters']:,}",
                f"{cells[0]['rate']:g}",
                figures.mean(cell_name(figures, task, name), _points).text(1),
                figures.mean(cell_name(figures, task, name), _less).text(1),
                "–" if own else gap.text(1),
                "–" if own else gap.seen(1),
            ]
        )
    columns = ["", "parameters", "rate", "accuracy, %", "loss taken, %", "− LoRA", "visible"]
    blocks = cell_name(figures, task, "lora").split("__")[2]
    return f"### {task}, the upper {blocks} of six blocks\n\n" + table(columns, rows)


def verdicts(figures: Figures) -> list[list[str]]:
    """A row for every comparison that was run: loss and accuracy over the tasks that have both sides."""
    rows = []
    for label, one, other, paper in CLAIMS:
        tasks = tuple(t for t in done(figures) if _whole(figures, t, one) and _whole(figures, t, other))
        if not tasks:
            continue
        loss = difference(figures, one, other, _less, tasks)
        right = difference(figures, one, other, _points, tasks)
        said = [
            f"{m.text(1)} (visible {m.seen(1)}): {m.verdict(p)}" for m, p in ((loss, None), (right, paper))
        ]
        rows.append([label, ", ".join(tasks), *said])
    return rows


def write(lab: Lab, docs: Path = DOCS) -> Path:
    """Put the numbers between the marks of the page."""
    figures = Figures(lab)
    parts = [
        "## What shows\n\n"
        + table(["", "tasks", "loss taken, points", "accuracy, points"], verdicts(figures)),
        "## The tasks",
        *(_task(figures, task) for task in TASKS if figures.cells(cell_name(figures, task, "lora"))),
    ]
    return put(docs / "evidence" / "pretrained.md", "\n\n".join(parts), "# Pretrained weights")
