"""What a prompt asks for: ``<spectral:name:te:unet:start=0:stop=1:curve=bell:mode=live>``.

As with ``<lora:…>`` the first number is the text encoder's strength and the second the picture model's; one
number stands for both. Words with ``=`` may stand anywhere behind the name:

- ``te``, ``unet``: the two strengths
- ``start``, ``stop``: where the adapter acts, 0 the noisiest step and 1 the cleanest
- ``curve``: a schedule by name (``linear in``, also written ``linear-in``), or ``custom`` with ``points``
- ``points``: ``0/1,0.5/0.3,1/0``, place/strength
- ``blocks``: strengths of single blocks, ``IN/0.5,attn2/0``
- ``mode``: ``live``, or ``frozen`` (adaptive gates replaced by their masks from training)
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spectral_core.adapter import block_strengths, schedule_words, strengths
from spectral_core.adapter.adapter import Adapter
from spectral_core.adapter.schedule import Schedule
from spectral_core.errors import SpectralAdapterError
from spectral_core.fusion import freeze

NETWORK = "spectral"
MODES = ("live", "frozen")
_NUMBERS = ("te", "unet", "start", "stop")
_WORDS = ("curve", "points", "blocks", "mode")
TAG = re.compile(rf"<{NETWORK}:([^<>]+)>")


@dataclass(frozen=True)
class Request:
    """One tag. ``unet`` None: as strong as the text encoder."""

    name: str
    te: float = 1.0
    unet: float | None = None
    start: float = 0.0
    stop: float = 1.0
    curve: str = "constant"
    points: str = ""
    blocks: str = ""
    mode: str = "live"

    @property
    def strength(self) -> float:
        """Of the picture's model."""
        return self.te if self.unet is None else self.unet


def parse(items: Sequence[object]) -> Request:
    """The pieces of a tag between its colons, without the first. Raises SpectralAdapterError that quotes what
    cannot be read."""
    pieces = [str(item).strip() for item in items]
    place = f"<{NETWORK}:{':'.join(pieces)}>"
    name, rest = (pieces[0], pieces[1:]) if pieces else ("", [])
    if not name or "=" in name:
        raise SpectralAdapterError(f"{place}: expected the adapter's name first, such as <{NETWORK}:name:1>")
    positional = [piece for piece in rest if "=" not in piece]
    if len(positional) > 2:
        raise SpectralAdapterError(
            f"{place}: {positional[2]!r} is one number too many; expected name:te:unet and then word=value"
        )
    found: dict[str, float | str] = {
        key: _number(place, key, value) for key, value in zip(("te", "unet"), positional, strict=False)
    }
    for piece in rest:
        key, equals, value = (part.strip() for part in piece.partition("="))
        if equals:
            found[key] = _named(place, key, value)
    request = Request(name, **found)  # type: ignore[arg-type]
    schedule_of(request, place)
    return request


def _named(place: str, key: str, value: str) -> float | str:
    if key in _NUMBERS:
        return _number(place, key, value)
    if key not in _WORDS:
        near = difflib.get_close_matches(key, [*_NUMBERS, *_WORDS], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SpectralAdapterError(
            f"{place}: {key!r} is no setting: {hint}Expected one of {', '.join([*_NUMBERS, *_WORDS])}"
        )
    if key == "mode" and value not in MODES:
        raise SpectralAdapterError(f"{place}: mode {value!r}: expected {' or '.join(MODES)}")
    return value.replace("-", " ").replace("_", " ") if key == "curve" else value


def _number(place: str, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SpectralAdapterError(f"{place}: {key} is {text!r}; expected a number")
    return value


def schedule_of(request: Request, place: str = "") -> Schedule | None:
    """The tag's schedule; None where it is the same at every step."""
    curve = schedule_words.CUSTOM if request.points and request.curve == "constant" else request.curve
    try:
        points = request.points.replace("/", ":")
        return schedule_words.named(curve, request.start, request.stop, points)
    except SpectralAdapterError as error:
        raise SpectralAdapterError(f"{place or request.name}: {error}") from error


def applied(adapter: Adapter, request: Request) -> Adapter:
    """The adapter with the strengths, the schedule and the mode that the tag asks for."""
    if request.mode == "frozen":
        adapter = freeze(adapter)
    scaled = strengths.on_sides(adapter, request.strength, request.te)
    scaled = strengths.over_denoising(scaled, schedule_of(request))
    return block_strengths.apply(scaled, request.blocks.replace("/", ":"))[0] if request.blocks else scaled


def tag(request: Request) -> str:
    """The shortest tag that means the same."""
    parts = [request.name, f"{request.te:g}"]
    if request.unet is not None and request.unet != request.te:
        parts.append(f"{request.unet:g}")
    plain = Request(request.name)
    for key in ("start", "stop", *_WORDS):
        value = getattr(request, key)
        if value != getattr(plain, key):
            parts.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return f"<{NETWORK}:{':'.join(parts)}>"


def rewritten(prompt: str, change: Callable[[Request], Request]) -> str:
    """The prompt with every readable tag changed; others stay for the run to complain about."""

    def one(match: re.Match[str]) -> str:
        try:
            return tag(change(parse(match[1].split(":"))))
        except SpectralAdapterError:
            return match[0]

    return TAG.sub(one, prompt)


def with_setting(prompt: str, key: str, value: object) -> str:
    """The prompt with one setting of all its tags replaced, for a grid's axes; ``strength`` sets both."""
    if key == "strength":
        return rewritten(prompt, lambda r: replace(r, te=float(str(value)), unet=None))
    if key in ("te", "unet"):
        number = float(str(value))
        if key == "te":
            return rewritten(prompt, lambda r: replace(r, te=number, unet=r.strength))
        return rewritten(prompt, lambda r: replace(r, unet=number))
    changed: dict[str, Any] = {key: str(value)}
    return rewritten(prompt, lambda r: replace(r, **changed))


def tags_in_lines(text: str) -> str:
    """Tags of a field in which every line is a tag, or the inside of one (``name:0.8``)."""
    lines = [line.strip() for line in text.splitlines()]
    return "".join(line if line.startswith("<") else f"<{NETWORK}:{line}>" for line in lines if line)
