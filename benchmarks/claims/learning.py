"""How fast each method learns a concept: a drawn character, and the photographs of a real one.

Snapshots of one run with a constant rate, at the rate of the method's own sweep for characters. Pictures of
``a picture of <word>`` are compared with the concept's own in the features of the shipped classifier; for the
character the judge's certainty is read as well. The base model without an adapter is step 0.

Photographs are not part of the project: ``--photos DIR`` names a folder of pictures with captions as kohya's
tools have them, ``<TOK>`` in the place of the word. They are too few to keep some back: their ``held_out``
loss is that of the pictures trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.claims.drawings import BACKGROUNDS
from benchmarks.claims.lab import Lab, Task
from benchmarks.claims.measure import CharacterMeter
from benchmarks.claims.recipes import RANK, block, foura, lora, rotation

RECIPES = (lora(RANK), foura("dct", "adaptive"), block(0), rotation(2 * RANK))
CHARACTER = "bot"
Cells = list[tuple[str, Callable[[], Mapping[str, Any]]]]


def tasks(lab: Lab) -> list[Task]:
    """The character, and the photographs where their folder is known."""
    found = [Task("character", CHARACTER)]
    return found + ([Task("photos", lab.photos.name, lab.photos)] if lab.photos else [])


def cell_name(kind: str, recipe: str, seed: int | str) -> str:
    return f"learning__{kind}__{recipe.replace(' ', '_')}__{seed}"


def cells(lab: Lab) -> Cells:
    return [
        (
            cell_name(task.kind, recipe.name, seed),
            lambda task=task, recipe=recipe, seed=seed: _cell(lab, task, recipe, seed),
        )
        for seed in lab.setting.seeds[:3]
        for task in tasks(lab)
        for recipe in RECIPES
    ]


def _cell(lab: Lab, task: Task, recipe: Any, seed: int) -> dict[str, Any]:
    rate = lab.rate("character", recipe)
    count = None if task.kind == "character" else len(task.pictures(0, 1000))
    runs = lab.trained(task, recipe, rate, seed, pictures=count, snapshots=lab.setting.learning_steps)
    meter = CharacterMeter(lab, [task.name], {task.name: task})
    prompts = None if task.kind == "character" else [f"a picture of {task.word}"] * len(BACKGROUNDS)
    found: dict[str, Any] = {"rate": rate, "0": meter.read(task.name, [], prompts=prompts)}
    for step, run in runs.items():
        last = seed == lab.setting.seeds[0] and step == max(runs)
        strip = f"learning__{task.kind}__{recipe.name.replace(' ', '_')}" if last else ""
        found[str(step)] = meter.read(task.name, [run.adapter], strip, prompts) | {"held_out": run.held_out}
    return found


def photo_folder(text: str) -> Path:
    """A folder with pictures and their captions."""
    folder = Path(text).expanduser()
    captions = list(folder.glob("*.txt"))
    lonely = [c.name for c in captions if all(f == c for f in folder.glob(f"{c.stem}.*"))]
    if not captions or lonely:
        found = f"{lonely[0]} has no picture" if lonely else "no caption (*.txt)"
        raise argparse.ArgumentTypeError(f"{folder}: {found}; expected a picture and a caption of each name")
    return folder
