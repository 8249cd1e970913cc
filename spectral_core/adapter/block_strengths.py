"""Strengths of single blocks in words: ``down_blocks.1: 0.5``, ``attn2: 0``, ``IN: 0.8``, ``OUT3: 1.2``.

A pattern is a piece of a layer's name from dot to dot, a glob over the whole name, or a short form: IN, MID,
OUT (the way down, the middle and the way up of a UNet), IN4 and OUT3 (one of its blocks by the number that
block-weight tools use), DOUBLE, SINGLE (Flux), TE or BASE (text encoders). Strengths multiply where several
patterns fit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from ..errors import SpectralAdapterError
from ..names import spellings as keys
from ..names.layer_name import check_glob, matches
from ..names.unet_blocks import unet_table
from .adapter import Adapter

MOST_ENTRIES = 256

_SHORT: dict[str, tuple[str, ...]] = {
    "IN": ("*.down_blocks.*", "*.input_blocks.*"),
    "MID": ("*.mid_block.*", "*.middle_block.*"),
    "OUT": ("*.up_blocks.*", "*.output_blocks.*"),
    "DOUBLE": ("*.double_blocks.*",),
    "SINGLE": ("*.single_blocks.*",),
    "TE": ("text_encoder*", "clip_*", "t5*", "kohya.lora_te*"),
}
_SHORT["BASE"] = _SHORT["TE"]
_NUMBERED = re.compile(r"(IN|OUT)(\d{1,2})")
_NATIVE = {"IN": "input_blocks", "OUT": "output_blocks"}


@dataclass(frozen=True)
class BlockWeight:
    """One entry: what was written, the globs it stands for, the multiplier, and how many layers it fits."""

    pattern: str
    globs: tuple[str, ...]
    multiplier: float
    layers: int

    def __str__(self) -> str:
        return f"{self.pattern} × {self.multiplier:g} ({self.layers} layers)"


def apply(adapter: Adapter, text: str) -> tuple[Adapter, tuple[BlockWeight, ...]]:
    """The adapter with the strengths that the text asks for, and what each entry came to mean.

    Raises SpectralAdapterError for an entry that cannot be read and for a pattern that fits no layer; it
    lists the blocks that there are.
    """
    found = tuple(_resolve(adapter, pattern, value) for pattern, value in parse(text))
    pairs = tuple((glob, entry.multiplier) for entry in found for glob in entry.globs)
    return replace(adapter, layer_strengths=(*adapter.layer_strengths, *pairs)), found


def parse(text: str) -> list[tuple[str, float]]:
    """(pattern, multiplier) of every entry; entries end with a comma, a semicolon or a line, # comments."""
    found = []
    for line in text.splitlines():
        for entry in re.split(r"[,;]", line.partition("#")[0]):
            if entry.strip():
                found.append(_entry(entry.strip()))
                if len(found) > MOST_ENTRIES:
                    raise SpectralAdapterError(f"block weights: more than {MOST_ENTRIES} entries")
    return found


def _entry(entry: str) -> tuple[str, float]:
    pattern, _, number = entry.replace("=", ":").rpartition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not pattern.strip() or not math.isfinite(value):
        raise SpectralAdapterError(
            f"block weights: {entry!r:.80} is no entry; expected block: strength, such as down_blocks.1: 0.5"
        )
    check_glob(pattern.strip(), "block weights:")
    return pattern.strip(), value


def _resolve(adapter: Adapter, pattern: str, value: float) -> BlockWeight:
    for globs in _candidates(adapter, pattern):
        fitting = [glob for glob in globs if any(matches(name, glob) for name in adapter.layers)]
        if fitting:
            count = sum(any(matches(name, glob) for glob in fitting) for name in adapter.layers)
            return BlockWeight(pattern, tuple(fitting), value, count)
    raise SpectralAdapterError(
        f"block weights: {pattern!r} fits no layer of this adapter. It has the blocks "
        f"{', '.join(blocks_of(adapter))}; short forms are {', '.join(_SHORT)}, IN<number>, OUT<number>"
    )


def _candidates(adapter: Adapter, pattern: str) -> list[tuple[str, ...]]:
    """Readings of a pattern, the first that fits any layer counts; the globs of one never overlap."""
    short = pattern.upper()
    if short in _SHORT:
        return [_SHORT[short]]
    if match := _NUMBERED.fullmatch(short):
        return [_numbered(adapter, match[1], int(match[2]))]
    inside = (f"*.{pattern}.*", f"*.{pattern}", f"*.{pattern}[[]*", f"{pattern}.*")
    return [(pattern,), inside[:1], inside[1:2], inside[2:3], inside[3:]]


def _numbered(adapter: Adapter, side: str, number: int) -> tuple[str, ...]:
    """Globs of one UNet block by its native number, in both spellings of its layers."""
    native = f"{_NATIVE[side]}.{number}."
    globs = [f"*.{native}*"]
    if any(name.startswith("unet.") for name in adapter.layers):
        table = unet_table(_layout(adapter).unet)
        starts = {
            ".".join(ours.split(".")[:4]) for ours, theirs in table.items() if theirs.startswith(native)
        }
        globs += [f"unet.{start}.*" for start in sorted(starts)]
    return tuple(globs)


def _layout(adapter: Adapter) -> keys.ModelLayout:
    family = adapter.provenance.family
    if not family:
        family = "sdxl" if keys.has_two_encoders(list(adapter.layers)) else "sd1"
    if family not in keys.LAYOUTS:
        raise SpectralAdapterError(
            f"block weights: the block numbers of a {family} model are not known here; expected names such "
            f"as {', '.join(blocks_of(adapter)[:3])}"
        )
    return keys.LAYOUTS[family]()


def blocks_of(adapter: Adapter) -> list[str]:
    """The blocks that an adapter has layers in: its names up to the first number."""
    found = dict.fromkeys(_block(name) for name in adapter.layers)
    return list(found)


def _block(name: str) -> str:
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match and ".mid_block." not in name else ".".join(name.split(".")[:2])
