"""What a run tells while it goes: events as dictionaries, one JSON line each in the run's ``events.jsonl``.

Every event has ``event`` (its kind) and ``step`` (optimiser steps done). Kinds: ``start``, ``resume``,
``step`` (loss, smoothed_loss, learning_rate, learning_rates by group, gradient_norm, steps_per_second,
seconds, seconds_left; of adaptive gates open_share and temperature, every tenth step open_by_layer and, of
ten equal parts of the noise level, the noisiest first, open_by_level),
``checkpoint``, ``sample``, ``gates``, ``warning``, ``error``, ``stopped``, ``finished``. Numbers that are
not finite become null.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import SpectralAdapterError
from ...whole_file import write_whole

Event = dict[str, Any]
Listener = Callable[[Event], None]

FILE = "events.jsonl"
SMOOTHING = 0.98


@dataclass
class Smoothed:
    """An exponential mean, corrected for its start: Σ βⁿ⁻ⁱ xᵢ / Σ βⁿ⁻ⁱ."""

    beta: float = SMOOTHING
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> float:
        self.total = self.beta * self.total + (1 - self.beta) * value
        self.weight = self.beta * self.weight + (1 - self.beta)
        return self.value

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else math.nan


@dataclass
class Clock:
    """Seconds of the run, those before a resume included; the speed is that of the last steps."""

    before: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    _pace: Smoothed = field(default_factory=lambda: Smoothed(0.9))
    _last: float | None = None

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def tick(self) -> float:
        """A step is done; the mean seconds per step of the last few."""
        now = time.perf_counter()
        found = self._pace.add(now - (self.started if self._last is None else self._last))
        self._last = now
        return found

    def skip(self) -> None:
        """What came since the last step (a sample, a checkpoint) does not count as part of the next."""
        self._last = time.perf_counter()


class EventLog:
    """Hands events to a listener and appends them to a file; either may be missing."""

    def __init__(self, folder: Path | None, listener: Listener | None) -> None:
        self._path = None if folder is None else folder / FILE
        self._listener = listener
        self._before = ""

    def say(self, kind: str, step: int, values: Mapping[str, Any]) -> Event:
        event = {"event": kind, "step": step} | {k: _plain(v) for k, v in values.items()}
        if self._path is not None:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(self._before + json.dumps(event) + "\n")
                self._before = ""
            except OSError:  # a full disk: the training matters more than its log, which goes on afterwards
                self._before = "\n"  # what was cut off ends there
        if self._listener is not None:
            self._listener(event)
        return event

    def forget_after(self, step: int) -> None:
        """Take out what an interrupted run wrote after the checkpoint it is resumed from."""
        if self._path is None or not self._path.is_file():
            return
        kept = [line for line, event in _lines(self._path) if event["step"] <= step]
        try:
            write_whole(self._path, "".join(kept))
        except OSError as error:
            raise SpectralAdapterError(
                f"{self._path}: cannot be written ({error.strerror or error}); make room or choose another "
                "folder"
            ) from error


def read_events(path: Path) -> list[Event]:
    """The events of a file; a last line that was cut off is left out, and whatever else is no event."""
    return [event for _, event in _lines(path)]


def _lines(path: Path) -> list[tuple[str, Event]]:
    found = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and isinstance(event.setdefault("step", 0), int):
                found.append((line if line.endswith("\n") else line + "\n", event))
    return found


def _plain(value: Any) -> Any:
    """JSON-able, without NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
