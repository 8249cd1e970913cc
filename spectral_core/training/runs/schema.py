"""What the JSON of a run's folder says, one check for each kind of file; reading checks it whole.

To the letter: no other types, no other names, no NaN. Written out here because Automatic1111 trains too, and
the checking library that other hosts ship is of another version there.

Shapes: none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import SpectralAdapterError
from ...files.container import strict_json

Check = Callable[[Any, str], None]
"""(value, its place) -> raises :class:`_Wrong` where it is not what is expected."""


class _Wrong(Exception):
    """A value that is not what the schema says."""


def _refuse(place: str, value: Any, expected: str) -> None:
    raise _Wrong(f"{place}: found {value!r:.60}; expected {expected}")


def anything(value: Any, place: str) -> None:
    """No check."""


def whole(least: int, most: int) -> Check:
    def check(value: Any, place: str) -> None:
        if type(value) is not int or not least <= value <= most:
            _refuse(place, value, f"a whole number from {least} to {most}")

    return check


def real(least: float = -math.inf, above: float = -math.inf) -> Check:
    def check(value: Any, place: str) -> None:
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not is_number or value < least or value <= above:
            _refuse(place, value, "a finite number in its range")

    return check


def text(pattern: str = "", most: int = 2**20) -> Check:
    def check(value: Any, place: str) -> None:
        if not isinstance(value, str) or len(value) > most or (pattern and not re.fullmatch(pattern, value)):
            _refuse(place, value, f"text like {pattern}" if pattern else "text")

    return check


def one_of(*choices: Any) -> Check:
    def check(value: Any, place: str) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            _refuse(place, value, f"one of {', '.join(map(repr, choices))}")

    return check


def or_none(inner: Check) -> Check:
    def check(value: Any, place: str) -> None:
        if value is not None:
            inner(value, place)

    return check


def listed(inner: Check, least: int = 0, most: int = 2**48) -> Check:
    def check(value: Any, place: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            _refuse(place, value, f"a list of {least} to {most}")
        for number, item in enumerate(value):
            inner(item, f"{place}.{number}")

    return check


def row(*inner: Check) -> Check:
    """A list with a check for each of its items."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, list) or len(value) != len(inner):
            _refuse(place, value, f"a list of {len(inner)}")
        for number, (item, of) in enumerate(zip(value, inner, strict=True)):
            of(item, f"{place}.{number}")

    return check


def mapped(inner: Check, key: str = "") -> Check:
    """A table with any names (of a pattern)."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            _refuse(place, value, "a table")
        for name, item in value.items():
            text(key)(name, f"{place}.{name}")
            inner(item, f"{place}.{name}")

    return check


def table(
    needed: Mapping[str, Check],
    optional: Mapping[str, Check] | None = None,
    others: tuple[str, Check] | None = None,
) -> Check:
    """A table with these names; others: a pattern of more names, and what they have."""
    known = {**needed, **(optional or {})}

    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            _refuse(place, value, "a table")
        for name in needed:
            if name not in value:
                _refuse(f"{place}.{name}", None, "a value")
        for name, item in value.items():
            inner = known.get(name)
            if inner is None and others is not None and re.fullmatch(others[0], str(name)):
                inner = others[1]
            if inner is None:
                _refuse(f"{place}.{name}", item, f"only {', '.join(known)}")
            else:
                inner(item, f"{place}.{name}")

    return check


COUNT = whole(0, 2**48)
POSITIVE = real(above=0)
PAIR = row(real(), real())
ANY_TABLE = mapped(anything)
CALIBRATION = row(real(least=0), POSITIVE, POSITIVE)  # Σ open gates, steps, rank

OPTIMISER = table(
    {"state": mapped(ANY_TABLE, "[0-9]{1,9}"), "groups": listed(ANY_TABLE)}
)  # what is no tensor of it

COUNTS = table({"mu": mapped(COUNT), "open": mapped(COUNT), "levels": mapped(COUNT)})
GATES = table(  # of one attached adapter
    {
        "mode": one_of("soft", "straight_through", "hard"),
        "temperature": POSITIVE,
        "calibrating": one_of(True, False),
        "counts": COUNTS,
    }
)
ALL_GATES = table({"runtimes": listed(GATES)})
ORDER = table({"queue": listed(COUNT)})
RANDOM = table(  # beside the generators' states, which are tensors
    {
        "python_version": one_of(3),
        "python_gauss": or_none(real()),
        "numpy_position": whole(0, 624),
        "numpy_has_gauss": whole(0, 1),
        "numpy_gauss": real(),
    }
)
WATCH = table({"first": listed(real()), "loss": PAIR, "power": PAIR})
KEPT = table({"parameters": ANY_TABLE, "gates": ALL_GATES})
VALIDATION = table(  # of the held-out pictures: when they were looked at, and the best state
    {"steps": listed(COUNT), "best_step": COUNT, "since": COUNT}, {"kept": or_none(KEPT)}
)
VALUES = table(  # the numbers of a checkpoint; the optimisers' are called optimiser0, …
    {
        "identity": ANY_TABLE,
        "step": COUNT,
        "start": COUNT,
        "steps": COUNT,
        "seconds": real(least=0),
        "smoothed": PAIR,
        "watch": WATCH,
        "share": real(),
        "calibration": mapped(CALIBRATION),
        "scaler": or_none(ANY_TABLE),
        "parameters": ANY_TABLE,
        "gates": ALL_GATES,
        "order": ORDER,
        "random": RANDOM,
    },
    {"averages": ANY_TABLE, "prior": or_none(ORDER), "validation": or_none(VALIDATION)},
    ("optimiser[0-9]", OPTIMISER),
)


_RESULT = r"[^/\\]+\.safetensors"


@dataclass(frozen=True)
class Record:
    """``result.json``: what a run has saved. ``file``: a name in the folder of the adapters."""

    CHECK = staticmethod(
        table(
            {"file": text(_RESULT, 255), "steps": COUNT},
            {"content": text(), "best": text(f"({_RESULT})?", 255)},
        )
    )
    file: str
    steps: int
    content: str = ""
    best: str = ""


@dataclass(frozen=True)
class Note:
    """A reservation of singular columns."""

    CHECK = staticmethod(
        table({"name": text(), "columns": listed(whole(0, 65_535), most=4096), "base": ANY_TABLE})
    )
    name: str
    columns: list[int]
    base: dict[str, Any]


Kind = TypeVar("Kind", Record, Note)


def problem(check: Check, values: Any) -> str:
    """The first place that is not what the schema says, what was found there and what is expected; empty
    where there is none."""
    try:
        check(values, "")
    except _Wrong as error:
        return str(error).removeprefix(".")
    return ""


def parsed(kind: type[Kind], words: str) -> Kind:
    """What a JSON text says. Raises SpectralAdapterError where it is none, or :func:`problem` has a word."""
    values = strict_json(words)
    if found := problem(kind.CHECK, values):
        raise SpectralAdapterError(found)
    return kind(**values)
