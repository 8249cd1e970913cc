"""The finished adapter of a named run: which file it is, and whether this run has made it.

A run's folder remembers in ``result.json`` what it saved. A file of that name that it has not made is
somebody else's: it is left alone, and the run's own gets the next free name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...adapter.adapter import Adapter
from ...errors import SpectralAdapterError
from ...files import writing as safewrite
from ...files.adapter_file import save
from ...files.reading import read_text
from .events import FILE, Event, read_events
from .outcome import TrainResult
from .place import RECORD, Place, write_json
from .schema import Record, parsed

STOPPED = "stopped.safetensors"


@dataclass(frozen=True)
class Result:
    """The file of a run's finished adapter. ``made``: this run has saved there before; ``best``: the name of
    the file beside it that this run has saved its best state in."""

    path: Path
    made: bool
    best: str = ""

    @property
    def is_there(self) -> bool:
        """The run has saved it, and nobody has taken it away."""
        return self.made and self.path.is_file()


def find_result(place: Place, adapters: Path) -> Result:
    """Where in the folder ``adapters`` the run has saved its adapter, or will.

    Raises SpectralAdapterError where its record cannot be read: its adapter is not saved a second time.
    """
    path = place.folder / RECORD
    if not path.exists():
        return Result(_free(adapters / f"{place.name}.safetensors"), False)
    try:
        record = parsed(Record, read_text(path))
        return Result(adapters / record.file, True, record.best)
    except SpectralAdapterError as error:
        raise SpectralAdapterError(
            f"{path}: what this run has saved cannot be read ({error}): take the file away, and the run "
            "saves its adapter under the next free name"
        ) from error


def save_result(adapter: Adapter, result: Result, place: Place, steps: int, best: Path | None = None) -> Path:
    """Save the finished adapter of ``steps`` steps and remember it; the file, which has another name when
    somebody has taken the expected one meanwhile. best: what :func:`save_best` has written."""
    path = result.path if result.made else _free(result.path)
    save(adapter, path, overwrite=result.made)
    record = {"file": path.name, "steps": steps, "content": adapter.content_hash}
    beside = result.best if best is None else best.name
    write_json(place.folder / RECORD, record | ({"best": beside} if beside else {}))
    return path


def save_best(make: Callable[[int], Adapter], found: TrainResult, result: Result) -> Path | None:
    """Save the best state beside the finished adapter, as ``<name>-best``, and say so in the notes; None
    where the finished one is the best, or nothing was held out.

    make: the adapter as it is now, after so many steps; called while the attachments are there.
    """
    best = found.best
    if best is None:
        return None
    path = result.path.with_name(f"{result.path.stem}-best.safetensors")
    path = result.path.with_name(result.best) if result.best else _free(path)
    with best.applied():
        adapter = make(best.step)
    save(adapter.with_provenance(name=path.stem), path, overwrite=bool(result.best))
    found.notes.append(
        f"step {best.step} had the lowest loss on held-out pictures ({best.loss:.4f}): saved as {path.name}"
    )
    return path


def past(place: Place) -> TrainResult:
    """What a finished run came to, as its events tell."""
    path = place.folder / FILE
    events = read_events(path) if path.is_file() else []
    seconds = [value for _, value in _numbers(events, "finished", "seconds")]
    return TrainResult(
        losses=[value for _, value in _numbers(events, "step", "loss")],
        held_out=dict(_numbers(events, "step", "held_out_loss")),
        seconds=seconds[-1] if seconds else 0.0,
        resumed_at=place.step,
    )


def _numbers(events: Sequence[Event], kind: str, name: str) -> list[tuple[int, float]]:
    """(step, one number) of every event of a kind that has it."""
    found = [(event.get("step"), event.get(name)) for event in events if event.get("event") == kind]
    return [(s, float(v)) for s, v in found if isinstance(s, int) and isinstance(v, int | float)]


def save_stopped(adapter: Adapter, place: Place) -> Path:
    """Save what a stopped run has learned so far, in its own folder."""
    path = place.folder / STOPPED
    save(adapter, path, overwrite=True)
    return path


def _free(path: Path) -> Path:
    return safewrite.free_name(path) if path.exists() else path
