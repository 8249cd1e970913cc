"""What the harness knows of a reader: sound inputs, how they are mutated, what is done with the result."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz import mutate

Change = Callable[[random.Random, Any], Any]


@dataclass(frozen=True)
class Reader:
    """seeds: sound inputs. change(rng, seed): a hostile one. read(input, folder): what a user would do with
    it; it raises AssertionError for a result that must not be. refuses: False where bad input is left out
    instead, as in logs and caches."""

    name: str
    seeds: tuple[Any, ...]
    change: Change
    read: Callable[[Any, Path], Any]
    refuses: bool = True


def of_file(
    name: str,
    seeds: tuple[bytes, ...],
    change: Change,
    read: Callable[[Path], Any],
    at: str,
    refuses: bool = True,
) -> Reader:
    """A reader of a file that is called ``at``; inputs are its bytes."""

    def write_and_read(content: bytes, scratch: Path) -> Any:
        path = scratch / at
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return read(path)

    return Reader(name, seeds, change, write_and_read, refuses)


def in_container(*words: str) -> Change:
    """Mutations of a safetensors file; words: the metadata's entries that are JSON."""
    return lambda rng, seed: mutate.container(rng, seed, words)


def texts(rng: random.Random, seed: bytes) -> bytes:
    """Mutations of a text file, as bytes or as text."""
    if rng.random() < 0.3:
        return mutate.data(rng, seed)
    return mutate.text(rng, seed.decode()).encode("utf-8", "surrogatepass")


def saved(make: Callable[[Path], Any], scratch: Path) -> bytes:
    """The content of the file that ``make`` writes; it returns its path where that is another one."""
    path = scratch / "seed.safetensors"
    path.unlink(missing_ok=True)
    made = make(path)
    return (made if isinstance(made, Path) else path).read_bytes()
