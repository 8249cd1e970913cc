"""What every benchmark shares: interleaved timing, targets, the table, and the result file.

    times = interleave({"base": run_base, "ours": run_ours}, repetitions=30)
    rows = [times.row(name, to="base") for name in times.seconds]
    target = Target("ours against base", times.ratio("ours", "base").median, 1.05)
    sys.exit(finish("layers", rows, [target]))

Ratios, not seconds, carry over to another machine: all candidates are measured in turn within one run, and a
ratio is the median over the rounds of (candidate in this round / reference in this round).
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from spectral_core.whole_file import write_whole

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "numpy", "safetensors", "diffusers", "transformers", "peft")
COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": lambda figure, limit: figure <= limit,
    ">=": lambda figure, limit: figure >= limit,
}

# --- timing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, first and third quartile of ``values`` (at least one)."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}-{self.high:.3f}]"


@dataclass(frozen=True)
class Times:
    """Seconds per call: one list per candidate, entry i of every list from the same round."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Median seconds of one call."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> Spread:
        """``name`` over ``to``, round by round; above 1 means slower than the reference."""
        return Spread.of([ours / ref for ours, ref in zip(self.seconds[name], self.seconds[to], strict=True)])

    def row(self, name: str, to: str) -> dict[str, Any]:
        """A table row: seconds and the ratio to ``to`` with its quartiles."""
        ratio = self.ratio(name, to)
        return {
            "name": name,
            "seconds": self.median(name),
            "ratio": ratio.median,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
        }


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    repetitions: int = 20,
    warmup: int = 2,
    minimum_seconds: float = 0.0,
) -> Times:
    """Measure all candidates in turn, ``repetitions`` rounds in one run.

    The order is drawn anew each round, so that no candidate always follows the same neighbour (a cold cache
    after the largest one). A candidate faster than ``minimum_seconds`` is called several times per
    measurement, and the time is per call. On a GPU every measurement ends with a synchronisation.
    """
    if repetitions < 1 or not candidates:
        raise ValueError(f"need candidates and at least one repetition; got {len(candidates)}, {repetitions}")
    calls = {}
    for name, run in candidates.items():
        for _ in range(warmup):
            _seconds(run, 1)
        calls[name] = max(1, round(minimum_seconds / max(_seconds(run, 1), 1e-9))) if minimum_seconds else 1
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for order in orders(names, repetitions):
        for name in order:
            seconds[name].append(_seconds(candidates[name], calls[name]))
    return Times({name: tuple(values) for name, values in seconds.items()})


def orders(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """All names in an order of its own for each round, the same orders every time."""
    draw = random.Random(5)
    for _ in range(rounds):
        yield draw.sample(list(names), len(names))


def _seconds(run: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls


def kept_for_backward(module: torch.nn.Module, step: Callable[[], object]) -> int:
    """Bytes of the distinct storages that autograd keeps in a step, frozen weights aside."""
    base = {p.untyped_storage().data_ptr() for p in module.parameters() if not p.requires_grad}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:  # a kept storage's address is its own until backward
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in base:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


# --- targets and the report -----------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A figure that has to stay on one side of a limit: ``figure op limit``.

    spread: the quartiles around the figure, where it is the median of several.
    """

    name: str
    figure: float
    limit: float
    op: str = "<="
    spread: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.op not in COMPARISONS:
            raise ValueError(f"{self.name}: comparison {self.op!r} is none of {', '.join(COMPARISONS)}")

    @classmethod
    def of(cls, name: str, found: Spread, limit: float, op: str = "<=") -> Target:
        """The median as the figure."""
        return cls(name, found.median, limit, op, (found.low, found.high))

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Target:
        """From a result file."""
        spread = (stored["low"], stored["high"]) if "low" in stored else None
        return cls(stored["name"], stored["figure"], stored["limit"], stored["op"], spread)

    @property
    def holds(self) -> bool:
        """False for a figure that is not a number, too."""
        return COMPARISONS[self.op](self.figure, self.limit)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "figure": self.figure,
            "op": self.op,
            "limit": self.limit,
            "holds": self.holds,
        } | ({} if self.spread is None else {"low": self.spread[0], "high": self.spread[1]})


def versions() -> dict[str, str]:
    """Python and the packages that decide the figures, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on; nothing that names the machine or its user."""
    found = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text; the columns are the keys in order of appearance, numbers stand to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    numeric = [all(_is_number(row.get(column)) for row in rows if column in row) for column in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = []
    for line in [columns, *cells]:
        placed = zip(line, widths, numeric, strict=True)
        lines.append("  ".join(text.rjust(w) if right else text.ljust(w) for text, w, right in placed))
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(line.rstrip() for line in lines)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finish(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    targets: Sequence[Target],
    settings: Mapping[str, Any] | None = None,
    folder: Path = RESULTS,
) -> int:
    """Print the table and the targets, write ``<name>.json``; 0 when every target holds, else 1.

    The file appears whole or not at all. ``settings``: what the run was called with.
    """
    print(table(rows))
    if targets:
        print("\n" + table([target.as_dict() for target in targets]))
    report = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "settings": dict(settings or {}),
        "rows": [dict(row) for row in rows],
        "targets": [target.as_dict() for target in targets],
        "holds": all(target.holds for target in targets),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_whole(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    missed = [target.name for target in targets if not target.holds]
    print(f"\nwritten: benchmarks/results/{path.name}" if folder == RESULTS else f"\nwritten: {path}")
    if missed:
        print(f"targets that do not hold: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0
