"""Hostile inputs for every reader: ``python -m tests.fuzz.run --minutes N``, also ``python dev.py fuzz``.

The same seed gives the same cases; a case that fails is told by reader, seed and number.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectral_core.errors import SpectralAdapterError
from tests.fuzz.readers import Reader, all_readers

SLOW = 1.0  # seconds of this process's time
LARGE = 200 << 20  # bytes that the process may grow by in one case


@dataclass
class Tally:
    """What became of a reader's cases; ``faults``: what must not be, each with its case."""

    cases: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.cases} cases, {self.refused} refused, {len(self.faults)} faults"


def case(reader: Reader, seed: int, number: int) -> Any:
    """The input of a case."""
    rng = random.Random(f"{reader.name}|{seed}|{number}")
    return reader.change(rng, rng.choice(reader.seeds))


def attempt(reader: Reader, seed: int, number: int, scratch: Path, tally: Tally) -> None:
    """Read one case, and note what became of it."""
    content = case(reader, seed, number)
    started, before = time.process_time(), _peak()
    tally.cases += 1
    problem = ""
    try:
        reader.read(content, scratch)
    except SpectralAdapterError:
        tally.refused += 1
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"[:200]
    spent = time.process_time() - started
    if spent > SLOW:
        problem = problem or f"took {spent:.1f} s"
    if _peak() - before > LARGE:
        problem = problem or f"took {(_peak() - before) >> 20} MB"
    if problem:
        tally.faults.append(f"{reader.name}, seed {seed}, case {number}: {problem}")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rounds(
    readers: Sequence[Reader], seed: int, seconds: float, most: int | None = None
) -> Iterator[dict[str, Tally]]:
    """Cases of all readers in turn, ten at a time, until the time is over or each has had ``most``."""
    tallies = {reader.name: Tally() for reader in readers}
    until, number = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while time.monotonic() < until and (most is None or number < most):
            for reader in readers:
                for i in range(number, number + 10):
                    attempt(reader, seed, i, Path(folder), tallies[reader.name])
                for left in Path(folder).iterdir():
                    left.unlink()
            number += 10
            yield tallies


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of readers")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        readers = [
            r for name, r in all_readers(Path(scratch)).items() if not given.only or name in given.only
        ]
    tallies: dict[str, Tally] = {}
    said = 0
    for tallies in rounds(readers, given.seed, given.minutes * 60):
        faults = [fault for tally in tallies.values() for fault in tally.faults]
        for fault in faults[said:]:
            print(fault, flush=True)
        said = len(faults)
    for name, tally in tallies.items():
        print(f"{name}: {tally}")
    total = sum(tally.cases for tally in tallies.values())
    print(f"{total} cases, {said} faults")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
