"""Every reader, with sound inputs of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.fuzz import of_files, of_runs, of_words
from tests.fuzz.reader import Reader


def all_readers(scratch: Path) -> Mapping[str, Reader]:
    """By name. scratch: an empty folder."""
    found = [reader for room in (of_files, of_runs, of_words) for reader in room.readers(scratch)]
    assert len({reader.name for reader in found}) == len(found)
    return {reader.name: reader for reader in found}
