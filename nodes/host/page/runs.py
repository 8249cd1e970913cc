"""Trainings for the page: their events, their state, and what they have learned so far as an adapter file."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.files.adapter_file import inspect
from ....spectral_core.training.data.locks import FileLock
from ....spectral_core.training.runs import checkpoint
from ....spectral_core.training.runs.events import FILE, Event, read_events
from ....spectral_core.training.runs.finished import RECORD, STOPPED
from ..files import names, paths
from ..training.live import WISH

MOST_STEPS = 1500  # of a run's step events; a longer run is thinned evenly
WAIT_SECONDS = 120.0  # for a step of a running training to end


def root() -> Path:
    return paths.runs()


def folder_of(name: str) -> Path:
    """A run's folder. Raises SpectralAdapterError for a name that leaves the runs or has none."""
    parts = names.safe_parts(name, "run name")
    folder = root().joinpath(*parts)
    if len(parts) != 1 or not folder.is_dir():
        raise SpectralAdapterError(f"run {name!r}: there is none in {paths.runs().name}")
    return folder


def is_running(folder: Path) -> bool:
    """Whether a training has the folder now, of this program or another."""
    lock = FileLock(folder / "run.lock")
    if not lock.try_acquire():
        return True
    lock.release()
    return False


def listing() -> list[dict[str, Any]]:
    """Name, state and last step of every run, the newest first."""
    if not root().is_dir():
        return []
    folders = [f for f in root().iterdir() if f.is_dir() and not f.name.startswith(".")]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [_short(folder) for folder in folders[:200]]


def _short(folder: Path) -> dict[str, Any]:
    step = next((step for step, _ in checkpoint.listed(folder)), 0)
    state = "running" if is_running(folder) else "finished" if (folder / RECORD).is_file() else "stopped"
    return {"name": folder.name, "state": state, "step": step}


def events_of(name: str) -> dict[str, Any]:
    """The events of a run, steps thinned, and whether it runs now; none of a run that is not there."""
    if not root().joinpath(*names.safe_parts(name, "run name")).is_dir():
        return {"name": name, "running": False, "events": []}
    folder = folder_of(name)
    file = folder / FILE
    events = read_events(file) if file.is_file() else []
    return {"name": name, "running": is_running(folder), "events": thinned(events)}


def thinned(events: list[Event], most: int = MOST_STEPS) -> list[Event]:
    """Every n-th step event, the last one and those with a held-out loss always, and every other event."""
    steps = [
        i for i, event in enumerate(events) if event.get("event") == "step" and "held_out_loss" not in event
    ]
    if len(steps) <= most:
        return events
    kept = {*steps[:: -(-len(steps) // most)], steps[-1]}
    thin = set(steps) - kept
    return [event for i, event in enumerate(events) if i not in thin]


def keep(name: str) -> str:
    """What a run has learned so far as an adapter that the loaders list; its name there.

    A running training is asked and saves it after its step. Waits for that; call it in a thread.
    """
    folder = folder_of(name)
    if is_running(folder):
        wish = folder / WISH
        wish.touch()
        until = time.monotonic() + WAIT_SECONDS
        while wish.exists() and time.monotonic() < until and is_running(folder):
            time.sleep(0.1)
        if not wish.exists():
            return _newest(name)
        wish.unlink(missing_ok=True)
    found = folder / STOPPED
    if not found.is_file():
        if newest := _newest(name, wanted=False):
            return newest
        raise SpectralAdapterError(
            f"run {name}: no adapter is kept yet: resume it, then stop it or ask again"
        )
    step = next((step for step, _ in checkpoint.listed(folder)), 0)
    path = paths.unfinished_file(name, step)
    inspect(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, path)
    return f"{paths.UNFINISHED}/{path.name}"


def _newest(name: str, wanted: bool = True) -> str:
    folder = paths.unfinished_file(name, 0).parent
    found = sorted(folder.glob(f"{name}-step-*.safetensors"), key=lambda path: path.stat().st_mtime)
    if found:
        return f"{paths.UNFINISHED}/{found[-1].name}"
    record = paths.finished_file(name)
    if record.is_file():
        return record.name
    if wanted:
        raise SpectralAdapterError(f"run {name}: nothing could be saved; the log says why")
    return ""
