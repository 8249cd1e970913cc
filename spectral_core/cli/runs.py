"""What the commands that train without pictures share: a named run around the training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..files.adapter_file import load
from ..training.config.config import TrainConfig
from ..training.runs.finished import find_result, save_result, save_stopped
from ..training.runs.outcome import TrainResult
from ..training.runs.place import Run, take_place
from . import train


@dataclass(frozen=True)
class Named:
    """Where a run is kept, how often, and how it is told."""

    folder: Path
    name: str
    checkpoint_every: int
    as_json: bool


def carry_out(
    named: Named,
    config: TrainConfig,
    settings: Mapping[str, Any],
    make: Callable[[str, Run], tuple[Adapter, TrainResult, Sequence[str]]],
) -> int:
    """Train, or go on, or say that it is finished; the exit code. settings: what else the result depends on,
    JSON-able. make: gets the run's name and the run."""
    known = json.loads(json.dumps({"config": config.as_dict(), **settings}))
    place = take_place(named.folder / ".runs", named.name, known)
    expected = find_result(place, named.folder)
    if place.state == "finished" and expected.is_there:
        load(expected.path)  # it can be used, or this says why not
        print(f"{place.name} is finished already ({place.step} steps): {expected.path}")
        return 0
    around = Run(place.folder, named.checkpoint_every, listener=train.listener(named.as_json))
    adapter, result, notes = make(place.name, around)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if result.stopped:
        print(f"stopped at step {len(result.losses)}; the same command goes on from there")
        print(f"what it has learned so far: {save_stopped(adapter, place)}")
        return 130
    path = save_result(adapter, expected, place, config.steps)
    print(f"{path}: {adapter.parameter_count:,} parameters, {result.seconds:.0f} s")
    return 0
