"""Hostile inputs for every reader: ``python -m tests.fuzz.run --minutes N``, also ``python dev.py fuzz``.

The same seed gives the same cases; a case that fails is told by reader, seed and number. With ``--state`` the
counts are kept in a file, and the next call goes on from there: also after a kill, and with other code, whose
cases are counted apart. The cases are tried in a process of their own: one that crashes it, or hangs where
Python cannot interrupt it, is a fault like the others, and the next process goes on behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.reader import Reader
from tests.fuzz.readers import all_readers

SLOW = 1.0  # seconds of this process's time
LARGE = 200 << 20  # bytes that the process may grow by in one case
HANGS = 20  # seconds after which a case is interrupted, and its process ended where that does not help
ROUND = 100  # cases of a reader in a row
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Tally:
    """What became of a reader's cases. ``faults``: what must not be, each with its case; ``codes``: cases by
    the digest of the code that read them; ``slowest`` seconds, ``largest`` bytes of one."""

    cases: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0
    codes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        size, codes = self.largest >> 20, f", {len(self.codes)} states of the code" if self.codes else ""
        return (
            f"{self.cases} cases, {self.refused} refused, {len(self.faults)} faults, slowest "
            f"{self.slowest:.2f} s, largest {size} MB{codes}"
        )


class Hangs(BaseException):
    """A case took so long that it was interrupted."""


def case(reader: Reader, seed: int, number: int) -> Any:
    """The input of a case."""
    rng = random.Random(f"{reader.name}|{seed}|{number}")
    return reader.change(rng, rng.choice(reader.seeds))


def attempt(reader: Reader, seed: int, number: int, scratch: Path, tally: Tally, code: str = "") -> None:
    """Read one case, and note what became of it."""
    content = case(reader, seed, number)
    started, before = time.process_time(), _peak()
    tally.cases += 1
    problem = ""
    try:
        with _interrupted(HANGS):
            reader.read(content, scratch)
    except Hangs:
        problem = "hangs"
    except Exception as error:
        if any(kind.__name__ == "SpectralAdapterError" for kind in type(error).__mro__):  # the pack's own too
            tally.refused += 1
        else:
            problem = f"{type(error).__name__}: {error}"[:200]
    spent, grown = time.process_time() - started, _peak() - before
    tally.slowest, tally.largest = max(tally.slowest, spent), max(tally.largest, grown)
    if spent > SLOW:
        problem = problem or f"took {spent:.1f} s"
    if grown > LARGE:
        problem = problem or f"took {grown >> 20} MB"
    if grown > 1 << 20:
        _forget_peak()
    if code:
        tally.codes[code] = tally.codes.get(code, 0) + 1
    if problem:
        tally.faults.append(f"{reader.name}, seed {seed}, case {number}: {problem}")


@contextlib.contextmanager
def _interrupted(seconds: float) -> Iterator[None]:
    """Raises Hangs after so many seconds of this process's time, where the system can do that."""
    if not hasattr(signal, "SIGVTALRM"):
        yield
        return

    def ring(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    """So that the next case that grows is seen (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def rounds(
    readers: Sequence[Reader],
    seed: int,
    seconds: float,
    most: int | None = None,
    tallies: dict[str, Tally] | None = None,
    codes: Mapping[str, str] | None = None,
    beginning: Callable[[int, int], None] = lambda reader, number: None,
    skipped: Iterable[str] = (),
) -> Iterator[dict[str, Tally]]:
    """Cases of all readers in turn, some at a time, until the time is over or each has had ``most``.

    tallies: those of an earlier call, which goes on there. beginning: is told each case before it is tried.
    skipped: cases that are not tried, ``<reader>|<number>``.
    """
    tallies = {} if tallies is None else tallies
    until = time.monotonic() + seconds
    skipped = set(skipped)
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while time.monotonic() < until:
            waiting = [r for r in readers if most is None or tallies.setdefault(r.name, Tally()).cases < most]
            if not waiting:
                return
            for reader in waiting:
                tally, code = tallies.setdefault(reader.name, Tally()), (codes or {}).get(reader.name, "")
                stop = tally.cases + ROUND if most is None else min(most, tally.cases + ROUND)
                while tally.cases < stop:
                    number = tally.cases
                    beginning(readers.index(reader), number)
                    if f"{reader.name}|{number}" in skipped:
                        tally.cases += 1
                        continue
                    attempt(reader, seed, number, Path(folder), tally, code)
                empty(Path(folder))
            yield tallies


def empty(folder: Path) -> None:
    """Take away all that lies in it."""
    for left in folder.iterdir():
        if left.is_dir():
            empty(left)
            left.rmdir()
        else:
            left.unlink()


def memory_folder() -> str | None:
    """A folder in memory: there is nothing to learn from a disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def code_of(reader: Reader) -> str:
    """Digest of the project's files whose functions the reader calls, on its seeds and its first cases."""
    files: set[str] = set()

    def called(frame: Any, event: str, _: object) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = [*reader.seeds, *(case(reader, 0, number) for number in range(30))]
        sys.setprofile(called)
        try:
            for content in inputs:
                with contextlib.suppress(Exception):
                    reader.read(content, Path(folder))
        finally:
            sys.setprofile(None)
    digest = hashlib.sha256()
    for file in sorted(f for f in files if f.startswith(str(ROOT)) and "/tests/" not in f):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:12]


# --- counts that are kept --------------------------------------------------------------------------------


def load(path: Path) -> tuple[dict[str, Tally], list[str]]:
    """The counts of earlier calls, and the cases that ended their process."""
    if not path.exists():
        return {}, []
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: Tally(**values) for name, values in found["readers"].items()}, found["skipped"]


def store(path: Path, seed: int, tallies: Mapping[str, Tally], skipped: Sequence[str]) -> None:
    values = {"seed": seed, "readers": {n: asdict(t) for n, t in tallies.items()}, "skipped": list(skipped)}
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(partial, path)


def campaign(readers: Sequence[Reader], seed: int, seconds: float, path: Path, most: int | None) -> None:
    """Cases in processes of their own until the time is over; the counts go into ``path``."""
    codes = {reader.name: code_of(reader) for reader in readers}
    place = mmap.mmap(-1, 16)  # reader and number of the case under way
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        child = os.fork()
        if not child:
            _work(readers, seed, left, path, most, codes, place)
        if _watched(child, place) == 0:
            return
        index, number = (int.from_bytes(place[i : i + 8], "little") for i in (0, 8))
        tallies, skipped = load(path)
        name = readers[index].name
        if f"{name}|{number}" in skipped:
            return  # whatever it is, it is not this case
        fault = f"{name}, seed {seed}, case {number}: ends or hangs the process"
        tallies.setdefault(name, Tally()).faults.append(fault)
        store(path, seed, tallies, [*skipped, f"{name}|{number}"])


def _work(
    readers: Sequence[Reader],
    seed: int,
    seconds: float,
    path: Path,
    most: int | None,
    codes: Mapping[str, str],
    place: mmap.mmap,
) -> None:
    """What the process of the cases does, to its end."""
    status = 1
    try:
        tallies, skipped = load(path)

        def beginning(reader: int, number: int) -> None:
            place[:16] = reader.to_bytes(8, "little") + number.to_bytes(8, "little")

        saved = time.monotonic()
        for _ in rounds(readers, seed, seconds, most, tallies, codes, beginning, skipped):
            if time.monotonic() - saved > 10:
                store(path, seed, tallies, skipped)
                saved = time.monotonic()
        store(path, seed, tallies, skipped)
        status = 0
    finally:
        os._exit(status)


def _watched(child: int, place: mmap.mmap) -> int:
    """The child's exit code; it is ended where one case takes far more time than a hang is given."""
    case_then, time_then = b"", 0.0
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.5)
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            spent = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            if place[:16] != case_then:
                case_then, time_then = place[:16], spent
            elif spent - time_then > 2 * HANGS:
                os.kill(child, signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, help="of each reader at most")
    parser.add_argument("--state", type=Path, help="a JSON file where the counts are kept (needs fork)")
    parser.add_argument("--only", nargs="*", help="names of readers")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=memory_folder()) as scratch:
        found = all_readers(Path(scratch))
    if unknown := set(given.only or ()) - set(found):
        parser.error(f"unknown readers {', '.join(unknown)}; there are {', '.join(found)}")
    readers = [r for name, r in found.items() if not given.only or name in given.only]
    tallies: dict[str, Tally] = {}
    if given.state is not None:
        campaign(readers, given.seed, given.minutes * 60, given.state, given.cases)
        tallies, _ = load(given.state)
    else:
        told: Counter[str] = Counter()
        for tallies in rounds(readers, given.seed, given.minutes * 60, given.cases):
            for name, tally in tallies.items():
                for fault in tally.faults[told[name] :]:
                    print(fault, flush=True)
                told[name] = len(tally.faults)
    for name, tally in tallies.items():
        print(f"{name}: {tally}")
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    print(f"{sum(tally.cases for tally in tallies.values())} cases, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
