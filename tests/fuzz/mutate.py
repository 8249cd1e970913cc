"""Mutations that know the form of what they change: bytes, JSON, texts; all from one seeded generator."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS = (0, -1, 1, 2, 7, 64, 2**31, 2**48, 2**63, 10**19, 0.5, -0.0, 1e30, 1e38, 1e300, 1e308, True, False)
WORDS = (
    "",
    "a",
    "NaN",
    "\ud800",
    "\0",
    "..",
    "re:.*",
    "*a" * 20,
    "9" * 400,
    "unet.x",
    "x" * 3000,
    "[0:5]",
    "İ",
)
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 3000,
    '{"a":' * 500,
    "\\",
    '"',
    ",,",
    "{}",
    "null",
)


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    pick = rng.random()
    if pick < 0.4:
        return rng.choice(NUMBERS)
    if pick < 0.65:
        return rng.choice(WORDS)
    if pick < 0.75 or depth > 2:
        return None
    items = [value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 3, 5)))]
    return items if rng.random() < 0.5 else {rng.choice(WORDS) + str(i): item for i, item in enumerate(items)}


def _places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below a node."""
    found: list[tuple[Any, Any]] = []
    waiting = [node]
    while waiting:
        here = waiting.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        for key in keys:
            found.append((here, key))
            waiting.append(here[key])
    return found


def table(rng: random.Random, node: Any) -> Any:
    """The table, a copy of it, with one to three of its values changed, moved, doubled, renamed or gone."""
    node = json.loads(json.dumps(node))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(node)
        if not places:
            return value(rng)
        here, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del here[key]
        elif kind == 1 and isinstance(here, dict):
            here[rng.choice(WORDS)] = here.pop(key)
        elif kind == 2:
            other, at = rng.choice(places)
            here[key] = json.loads(json.dumps(other[at])) if _has(other, at) else value(rng)
        elif kind == 3 and isinstance(here[key], list):
            here[key] = here[key] * rng.choice((0, 2, 50))
        elif kind == 4 and isinstance(here[key], int | float):
            here[key] = here[key] * rng.choice((-1, 2, 0.5, 1e30)) + rng.choice((0, 1, -1))
        else:
            here[key] = value(rng)
    return node


def _has(here: Any, key: Any) -> bool:
    return key in here if isinstance(here, dict) else isinstance(key, int) and key < len(here)


def text(rng: random.Random, start: str) -> str:
    """The text with pieces put in, cut out and doubled."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(start) + 1)
        end = min(len(start), at + rng.choice((0, 1, 3, 20)))
        piece = rng.choice(
            (*RAW, *WORDS, start[at:end] * rng.choice((2, 40)), rng.choice(",;:*?[]{}#=.-\n 0"))
        )
        start = start[:at] + piece + start[end:]
    return start


def data(rng: random.Random, start: bytes) -> bytes:
    """Bytes flipped, cut, put in, zeroed; floats made NaN, infinite and huge."""
    found = bytearray(start)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[at : at + rng.choice((1, 4, 64, 10**6))]
        elif kind == 2:
            found[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
        elif kind == 3:
            found[at : at + 32] = bytes(min(32, len(found) - at))
        elif kind == 4:
            at -= at % 4
            found[at : at + 4] = rng.choice(
                (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\xff\xff\xff\xff")
            )
        else:
            found[at : at + 8] = rng.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
    return bytes(found)


def container(rng: random.Random, whole: bytes, words: tuple[str, ...]) -> bytes:
    """A safetensors file changed where it hurts: in the bytes, the header, its words, or JSON inside these.

    words: the metadata's entries that are JSON themselves.
    """
    length = int.from_bytes(whole[:8], "little")
    header, rest = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    metadata = header.setdefault("__metadata__", {})
    kind = rng.randrange(8)
    if kind == 0:
        return data(rng, whole)
    if kind <= 3 and (inside := [w for w in words if w in metadata]):
        word = rng.choice(inside)
        if rng.random() < 0.15:
            metadata[word] = text(rng, metadata[word])
        else:
            metadata[word] = json.dumps(table(rng, json.loads(metadata[word])))
    elif kind == 4:
        rest = data(rng, rest)
    elif kind == 5:
        header, rest = _retyped(rng, header, rest)
    else:
        header = table(rng, header)
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        raw = text(rng, raw.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + rest


SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1}


def _retyped(rng: random.Random, header: dict[str, Any], rest: bytes) -> tuple[dict[str, Any], bytes]:
    """A sound file with tensors of other types, shapes and numbers, for the readers above the container."""
    made, parts, position = {"__metadata__": header.get("__metadata__", {})}, [], 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, kind, piece = list(entry["shape"]), entry["dtype"], rest[slice(*entry["data_offsets"])]
        if rng.random() < 0.3:
            kind = rng.choice(list(SIZES))
            count = 1
            for size in shape:
                count *= size
            piece = (piece * 8)[: count * SIZES[kind]]
        if rng.random() < 0.1:
            shape = rng.choice(([], [0], shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [2, 2]))
            count = 1
            for size in shape:
                count *= size
            piece = (piece + rng.randbytes(8) * count)[: count * SIZES[kind]]
        if rng.random() < 0.1:
            continue
        made[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, position + len(piece)]}
        parts.append(piece)
        position += len(piece)
    return made, b"".join(parts)
