"""A layer's name, ``<part>.<path>``, taken apart and matched.

Part ``unet``, ``text_encoder`` or ``text_encoder_2`` (or any other word without a dot), path the module's
path in that part, with ``[start:stop]`` behind it where only those output rows of a fused weight are meant.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

from ..errors import SpectralAdapterError

_NAME = re.compile(r"(?P<part>[^.\[\]]+)\.(?P<path>[^\[\]]+)(?:\[(?P<start>\d+):(?P<stop>\d+)\])?")


@dataclass(frozen=True)
class LayerName:
    """A layer's name taken apart; ``rows`` is (start, stop) of a fused weight's output rows."""

    part: str
    path: str
    rows: tuple[int, int] | None = None

    @classmethod
    def parse(cls, name: str) -> LayerName:
        match = _NAME.fullmatch(name)
        if match is None:
            raise SpectralAdapterError(
                f"layer name {name!r}: expected <part>.<path> or <part>.<path>[start:stop]"
            )
        rows = None if match["start"] is None else (int(match["start"]), int(match["stop"]))
        if rows is not None and rows[0] >= rows[1]:
            raise SpectralAdapterError(f"layer name {name!r}: expected start < stop in its rows")
        return cls(match["part"], match["path"], rows)

    def __str__(self) -> str:
        rows = "" if self.rows is None else f"[{self.rows[0]}:{self.rows[1]}]"
        return f"{self.part}.{self.path}{rows}"


def matches(name: str, pattern: str) -> bool:
    """Whether a layer's name is the pattern or fits it as a glob (a name with rows has brackets, so it
    comes first)."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)
