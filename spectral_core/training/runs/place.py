"""Where a run is kept, who listens, who may stop it; and its folder, which one training at a time may use.

A run's folder holds ``checkpoint-<step>.safetensors`` (the newest few), ``events.jsonl``, ``samples/``, and
what the caller adds (``start.safetensors``, the adapter it began with). A run whose folder has a checkpoint
goes on from it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ...errors import SpectralAdapterError
from ...files.container import strict_json
from ...files.reading import read_text
from ...whole_file import write_whole
from ..data.locks import FileLock
from . import checkpoint
from .events import Listener
from .schema import Record, parsed

SETTINGS_FILE = "run.json"
RECORD = "result.json"  # of a finished run: see finished.py
MOST_RUNS = 1000  # of one name with different settings

Sampler = Callable[[int], Sequence[Image]]
"""Draws the sample pictures of a step; whatever random numbers it takes, the training does not notice."""


@dataclass(frozen=True)
class Run:
    """What surrounds a training; nothing here changes its result.

    folder: where it is kept; None keeps nothing. checkpoint_every, sample_every: steps between, 0 for never
    (a checkpoint also comes at the end, when cancelled and after an error). keep: newest checkpoints kept.
    sampler: draws the samples. listener: gets every event. cancel: asked before each batch; True stops.
    """

    folder: Path | None = None
    checkpoint_every: int = 0
    sample_every: int = 0
    keep: int = 2
    sampler: Sampler | None = None
    listener: Listener | None = None
    cancel: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        for name, least in (("checkpoint_every", 0), ("sample_every", 0), ("keep", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SpectralAdapterError(f"{name} {value!r}: expected a whole number of at least {least}")


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """The folder, made where it is missing, for this training alone."""
    if folder is None:
        yield
        return
    make(folder, "run folder")
    lock = FileLock(folder / "run.lock")
    if not lock.try_acquire():
        raise SpectralAdapterError(
            f"run folder {folder}: another training is using it; wait for it, stop it, or choose another name"
        )
    with lock:
        _remove_unfinished(folder)
        yield


def make(folder: Path, what: str) -> None:
    """The folder, where it is missing; ``what`` it is, in words."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpectralAdapterError(
            f"{what} {folder}: cannot be made ({error.strerror or error}); choose another"
        ) from error


def _remove_unfinished(folder: Path) -> None:
    """Files that a dead training had not finished writing: who holds the folder's lock is its only writer."""
    for path in (*folder.glob("*.part"), *folder.glob(".*.part")):
        with contextlib.suppress(OSError):
            path.unlink()


@dataclass(frozen=True)
class Place:
    """A run's folder. ``state``: new, unfinished or finished; ``earlier``: names taken by other settings."""

    folder: Path
    name: str
    state: str
    step: int = 0
    earlier: tuple[str, ...] = ()


def find_place(root: Path, name: str, settings: Mapping[str, Any], extend: bool = False) -> Place:
    """The folder of a named run under ``root``: the same settings find their run again, others get name-2, ….

    settings: JSON-able, with the number of steps as ``settings["config"]["steps"]``. extend: a run that
    differs in fewer steps only is found too. Writes nothing; see :func:`claim`.
    """
    if not name or name.startswith(".") or Path(name).name != name:
        raise SpectralAdapterError(f"run name {name!r}: expected a plain name without slashes")
    earlier: list[str] = []
    for number in range(1, MOST_RUNS):
        candidate = name if number == 1 else f"{name}-{number}"
        folder = root / candidate
        known = read_settings(folder)
        if known is None and not checkpoint.listed(folder):
            return Place(folder, candidate, "new", earlier=tuple(earlier))
        if known is not None and (_same(known, settings) or (extend and _extends(known, settings))):
            step = next((step for step, _ in checkpoint.listed(folder)), 0)
            ended = step >= (steps := settings["config"]["steps"]) or _ended_early(folder, steps)
            state = "finished" if ended else "unfinished"
            return Place(folder, candidate, state, step, tuple(earlier))
        earlier.append(candidate)
    raise SpectralAdapterError(f"run name {name!r}: {MOST_RUNS} runs have it; choose another")


def _ended_early(folder: Path, steps: int) -> bool:
    """Whether the run has saved its adapter, before so many steps."""
    with contextlib.suppress(SpectralAdapterError, OSError):
        return parsed(Record, read_text(folder / RECORD)).steps == steps
    return False


def take_place(
    root: Path,
    name: str,
    settings: Mapping[str, Any],
    extend: bool = False,
    asked: Callable[[], None] = lambda: None,
) -> Place:
    """:func:`find_place`, and the folder is that run's from then on; two programs never take the same one.

    asked: called while another program is waited for; what it raises ends the waiting.
    """
    with FileLock(root / ".runs.lock", asked):
        place = find_place(root, name, settings, extend)
        claim(place, settings)
    return place


def claim(place: Place, settings: Mapping[str, Any]) -> None:
    """Write the run's settings into its folder, which makes it that run's."""
    write_json(place.folder / SETTINGS_FILE, settings)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a small file of a run's folder, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(values, indent=1, sort_keys=True))
    except OSError as error:
        raise SpectralAdapterError(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another folder"
        ) from error


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings that a run's folder was made with; None where there are none.

    Raises SpectralAdapterError for a file that cannot be read: the run is neither resumed nor begun anew
    beside itself.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        return None
    try:
        found = strict_json(read_text(path))
        if not isinstance(found, dict):
            raise SpectralAdapterError("no table")
    except SpectralAdapterError as error:
        raise SpectralAdapterError(
            f"{path}: the settings of this run cannot be read ({error}): put the file back from a copy, take "
            "the folder away, or choose another name for the run"
        ) from error
    return found


def _same(known: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    return bool(known == json.loads(json.dumps(settings)))


def _extends(known: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    try:
        fewer = known["config"]["steps"] < settings["config"]["steps"]
        longer = {**known, "config": {**known["config"], "steps": settings["config"]["steps"]}}
    except (KeyError, TypeError):
        return False
    return fewer and _same(longer, settings)


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``name: there, here`` for every value that differs between two JSON-able tables."""
    found = []
    for key in sorted({*known, *wanted}):
        a, b = known.get(key), wanted.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {str(a)[:60]} there, {str(b)[:60]} here")
    return found
