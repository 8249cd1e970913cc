"""Which singular columns a new concept gets: the lowest block that no file of the same base uses.

The files in the adapter folder are the ledger; nothing else has to be kept. While a concept trains it has no
file yet, so its columns are reserved by a small note beside the files, with a lock that dies with the
training.

Shapes: columns are indices, 0 the largest.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...adapter.fingerprint import compare_bases
from ...errors import SpectralAdapterError
from ...files.adapter_file import VERSION_KEY, inspect
from ...files.container import open_safely
from ...files.reading import read_text
from ...fusion.columns import ranges
from ...maths.svd import Columns
from ...maths.svd_cache import SVDCache
from ...methods import Basis, MethodConfig, method_of
from ...whole_file import write_whole
from ..data.locks import FileLock
from ..runs.schema import Note, parsed

FOLDER = ".columns"
MOST_TOLD = 5  # files that could not be read


@dataclass(frozen=True)
class Use:
    """Columns that a file, or a training under way, holds."""

    holder: str
    columns: frozenset[int]


class Reservation:
    """Columns held for a training until it ends; a context manager. ``notes`` says with whom they are
    shared."""

    def __init__(self, columns: Sequence[int], notes: Sequence[str], lock: FileLock, note: Path) -> None:
        self.columns, self.notes = tuple(columns), tuple(notes)
        self._lock, self._note = lock, note

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self._note.unlink()
        self._lock.remove()

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def reserve(
    folder: Path,
    base: Mapping[str, Any],
    wanted: int | Sequence[int],
    name: str,
    asked: Callable[[], None] = lambda: None,
) -> Reservation:
    """Columns for a concept of this base (a fingerprint): the lowest free block of ``wanted`` neighbours, or
    exactly those that are given, with a note where somebody holds them already, and where a file could not
    be asked.

    asked: called while another program is waited for; what it raises ends the waiting. Raises
    SpectralAdapterError for a folder that cannot be written.
    """
    with FileLock(folder / FOLDER / "lock", asked):
        held, skipped = files_of(folder, base)
        uses = [*held, *_under_way(folder, base)]
        used = {c for use in uses for c in use.columns}
        columns = lowest_free(used, wanted) if isinstance(wanted, int) else tuple(wanted)
        notes = [
            f"columns {ranges(sorted(shared))} are taken by {use.holder}: the concepts will mix when they "
            "are fused; leave columns empty to get free ones"
            for use in uses
            if (shared := use.columns & set(columns))
        ]
        notes += [f"which columns it holds is not known: {why}" for why in skipped[:MOST_TOLD]]
        if len(skipped) > MOST_TOLD:
            notes.append(f"and so of {len(skipped) - MOST_TOLD} more files")
        return _write_note(folder, base, columns, name, notes)


def lowest_free(used: set[int], count: int) -> tuple[int, ...]:
    """The lowest ``count`` neighbouring columns that are not used."""
    if count < 1:
        raise SpectralAdapterError(f"{count} columns to reserve: expected at least 1")
    starts = (0, *sorted(c + 1 for c in used))
    start = next(s for s in starts if used.isdisjoint(range(s, s + count)))
    return tuple(range(start, start + count))


def files_of(folder: Path, base: Mapping[str, Any]) -> tuple[list[Use], list[str]]:
    """What the adapter files below a folder hold of this base's columns, and why some could not be read;
    hidden folders, such as those of runs, are left out. A file of another kind holds nothing; one without a
    fingerprint is taken to be of this base if its layers are."""
    found, skipped = [], []
    for path in sorted(folder.rglob("*.safetensors")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        # damaged, whatever way: nobody will fuse it, and it must not stop the training of another
        try:
            if VERSION_KEY not in open_safely(path).metadata:
                continue
            summary = inspect(path)
            columns = frozenset(
                c
                for plan in summary.layers.values()
                for term in plan.terms
                for c in term.config.singular_columns
            )
            if columns and _same_base(summary.config.provenance.base, base, set(summary.layers)):
                found.append(Use(path.relative_to(folder).as_posix(), columns))
        except (SpectralAdapterError, ValueError, TypeError, KeyError, OSError) as error:
            skipped.append(f"{error}" if isinstance(error, SpectralAdapterError) else f"{path}: {error}")
    return found, skipped


def _same_base(theirs: Mapping[str, Any], ours: Mapping[str, Any], layers: set[str]) -> bool:
    if not theirs:
        return bool(layers & set(ours.get("layers", {})))
    match = compare_bases(theirs, ours)
    return match.compared > 0 and match.verdict != "different"


def _under_way(folder: Path, base: Mapping[str, Any]) -> Iterator[Use]:
    """Reservations whose training lives; those of a dead one are taken away."""
    for note in sorted((folder / FOLDER).glob("*.json")):
        lock = FileLock(note.with_suffix(".lock"))
        if lock.try_acquire():
            with contextlib.suppress(OSError):
                note.unlink()
            lock.remove()
            continue
        with contextlib.suppress(ValueError, KeyError, TypeError, SpectralAdapterError):
            found = parsed(Note, read_text(note))
            if _same_base(found.base, base, set(found.base["layers"])):
                yield Use(f"the training of {found.name}", frozenset(found.columns))


def _write_note(
    folder: Path, base: Mapping[str, Any], columns: Sequence[int], name: str, notes: Sequence[str]
) -> Reservation:
    note = folder / FOLDER / f"{secrets.token_hex(6)}.json"
    lock = FileLock(note.with_suffix(".lock"))
    taken = lock.try_acquire()
    assert taken, "a new name"
    try:
        values = {"name": name, "columns": list(columns), "base": dict(base)}
        write_whole(note, json.dumps(values))
    except OSError as error:
        lock.remove()
        raise SpectralAdapterError(
            f"{note}: cannot be written ({error.strerror or error}); make room or choose another folder"
        ) from error
    return Reservation(columns, notes, lock, note)


def basis_source(
    method: MethodConfig, cache: SVDCache, between: Callable[[], object] = lambda: None
) -> Callable[[str, Tensor], Basis] | None:
    """Singular columns from the cache on disk, for the methods that need some. between: called before each
    layer."""
    if not method_of(method).needs_basis:
        return None
    columns = Columns.listed(method.singular_columns)

    def basis(_: str, weight: Tensor) -> Basis:
        between()
        found = cache.get_or_compute(weight, columns)
        return found.u, found.s, found.v

    return basis
