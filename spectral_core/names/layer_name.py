"""A layer's name, ``<part>.<path>``, taken apart and matched.

Part ``unet``, ``text_encoder`` or ``text_encoder_2`` (or any other word without a dot), path the module's
path in that part, with ``[start:stop]`` behind it where only those output rows of a fused weight are meant.
A path that ends in ``.bias`` or ``.weight`` is that vector of the module before it.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from functools import lru_cache

from ..errors import SpectralAdapterError

MOST_LETTERS = 1000  # of a name or a glob
MOST_STARS = 8  # of a glob: each multiplies the ways in which it may fit
MOST_ROWS = 2**31

VECTORS = ("weight", "bias")

_NAME = re.compile(
    r"(?P<part>[^.\[\]]+)\.(?P<path>[^\[\]]+)(?:\[(?P<start>[0-9]{1,10}):(?P<stop>[0-9]{1,10})\])?"
)


@dataclass(frozen=True)
class LayerName:
    """A layer's name taken apart; ``rows`` is (start, stop) of a fused weight's output rows."""

    part: str
    path: str
    rows: tuple[int, int] | None = None

    @classmethod
    def parse(cls, name: str) -> LayerName:
        match = _NAME.fullmatch(name) if len(name) <= MOST_LETTERS else None
        if match is None:
            raise SpectralAdapterError(
                f"layer name {name!r:.200}: expected <part>.<path> or <part>.<path>[start:stop], at most "
                f"{MOST_LETTERS} letters"
            )
        rows = None if match["start"] is None else (int(match["start"]), int(match["stop"]))
        if rows is not None and not rows[0] < rows[1] <= MOST_ROWS:
            raise SpectralAdapterError(
                f"layer name {name!r:.200}: expected start < stop in its rows, at most {MOST_ROWS}"
            )
        return cls(match["part"], match["path"], rows)

    @property
    def vector(self) -> tuple[str, str] | None:
        """(the module's path, ``weight`` or ``bias``) where the layer is a vector of a module: a bias, or the
        weight of a norm; None for a matrix."""
        path, _, last = self.path.rpartition(".")
        return (path, last) if path and last in VECTORS else None

    def __str__(self) -> str:
        rows = "" if self.rows is None else f"[{self.rows[0]}:{self.rows[1]}]"
        return f"{self.part}.{self.path}{rows}"


def matches(name: str, pattern: str) -> bool:
    """Whether a layer's name is the pattern or fits it as a glob (a name with rows has brackets, so it
    comes first)."""
    return name == pattern or _compiled(pattern).match(name) is not None


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def check_glob(pattern: str, place: str) -> None:
    """Refuse a glob that takes more than a moment to match; ``place`` begins the message."""
    if pattern.startswith("re:"):
        raise SpectralAdapterError(
            f"{place} {pattern!r:.80}: regular expressions are not read (some never end); write globs: "
            "down_blocks.*, *.to_[qk]"
        )
    if pattern.count("*") > MOST_STARS:
        raise SpectralAdapterError(
            f"{place} {pattern!r:.80}: {pattern.count('*')} stars, at most {MOST_STARS} are read"
        )
    if len(pattern) > MOST_LETTERS:
        raise SpectralAdapterError(
            f"{place}: a pattern of {len(pattern)} letters, at most {MOST_LETTERS} are read"
        )
