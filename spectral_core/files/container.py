"""The safetensors container, read without trust; :mod:`.writing` writes it.

A file is 8 bytes (length of the header, little-endian), the header (JSON: tensor name -> dtype, shape, place;
and ``__metadata__``, words to words), then the tensors' bytes. Here every claim of the header is checked
against the file before a tensor is read: sizes, places, overlaps, gaps, types, names given twice. There is no
pickle anywhere.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from ..errors import SpectralAdapterError
from . import other_kinds as foreign
from .reading import refuse_more_than_memory, refuse_special

MAX_HEADER = 32 << 20  # bytes; LoRA files of large models, with their training captions, stay below 4 MB
MAX_TENSORS = 50_000
MAX_NAME = 2000  # letters of a tensor's name
MAX_TABLES = 200_000  # lists and tables of one JSON, which take ten times the memory of their text
MAX_VALUES = 2_000_000
MAX_DIMENSIONS = 8

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor as the header tells it; ``start`` and ``stop`` count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SafeFile:
    """A checked header. Tensors are read by :meth:`read`, into memory of their own."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int

    def read(self, names: list[str] | None = None) -> dict[str, Tensor]:
        """The tensors of these names (default: all). Raises where the file has changed or ends early."""
        wanted = list(self.entries) if names is None else names
        refuse_more_than_memory(self.path, sum(self.entries[n].stop - self.entries[n].start for n in wanted))
        # tensors made under inference mode, where hosts run their nodes, could never be trained
        with _reading(self.path) as stream, torch.inference_mode(False):
            return {name: self._read(stream, name) for name in wanted}

    def _read(self, stream: BinaryIO, name: str) -> Tensor:
        entry = self.entries[name]
        data = bytearray(entry.stop - entry.start)
        stream.seek(self.data_start + entry.start)
        if stream.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise SpectralAdapterError(
                f"{self.path}: tensor {name!r} ends early: the file changed while it was read"
            )
        if not data:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


def open_safely(path: str | os.PathLike[str]) -> SafeFile:
    """Check a safetensors file's header. No tensor is read yet.

    Raises SpectralAdapterError, with the file's name, for anything but a sound safetensors file.
    """
    path = Path(path)
    _refuse_missing(path)
    with _reading(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(512)
        length = int.from_bytes(head[:8], "little")
        # a length may begin with the same bytes as another format's mark: look at a likely header first
        is_likely = length <= MAX_HEADER and head[8:9] == b"{"
        if not is_likely and (reason := foreign.of_first_bytes(head)):
            raise SpectralAdapterError(f"{path}: {reason}")
        if size < 10 or length < 2 or length > min(MAX_HEADER, size - 8):
            raise SpectralAdapterError(
                f"{path}: not a safetensors file, or a truncated one: it claims a header of {length} bytes "
                f"and has {size} bytes (allowed: at most {MAX_HEADER}). Download or copy it again"
            )
        stream.seek(8)
        raw = stream.read(length)
    try:
        header = strict_json(raw)
        if not isinstance(header, dict):
            raise SpectralAdapterError(f"the header is a {type(header).__name__}, expected an object")
        metadata = _metadata(header.pop("__metadata__", {}))
        if len(header) > MAX_TENSORS:
            raise SpectralAdapterError(f"{len(header)} tensors, allowed are {MAX_TENSORS}")
        entries = {name: _entry(name, value) for name, value in header.items()}
        _check_places(entries, size - 8 - length)
    except SpectralAdapterError as error:
        raise SpectralAdapterError(
            f"{path}: damaged header: {error}. Download or copy the file again"
        ) from error
    return SafeFile(path, entries, metadata, 8 + length)


def strict_json(raw: bytes | str) -> Any:
    """JSON as the standard means it: UTF-8, no name twice, no NaN; else SpectralAdapterError."""
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        _refuse_many(text)
        return json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_int=_small_int,
            parse_float=_finite,
        )
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: also of decoding and of numbers with too many digits
        raise SpectralAdapterError(f"not valid JSON ({error})") from error


# a word with its quotes; one without its end goes on to the end of the text, so that the search stays linear
_WORDS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)


def _refuse_many(text: str) -> None:
    """Before anything is made of it: not more lists, tables and values than the bounds allow."""
    if text.count("[") + text.count("{") <= MAX_TABLES and text.count(",") <= MAX_VALUES:
        return
    plain = _WORDS.sub("", text)  # what stands in words is text alone
    for what, found, most in (
        ("lists and tables", plain.count("[") + plain.count("{"), MAX_TABLES),
        ("values", plain.count(","), MAX_VALUES),
    ):
        if found > most:
            raise SpectralAdapterError(f"{found} {what}, allowed are {most}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise SpectralAdapterError(f"the name {twice!r:.200} is given twice")
    return found


def _no_constant(word: str) -> NoReturn:
    raise SpectralAdapterError(f"the number {word} is not allowed")


def _small_int(digits: str) -> int:
    if len(digits) > 19:  # beyond 64 bits; nothing here counts that far, and float() of it may overflow
        _no_constant(digits[:20] + "…")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _no_constant(digits)  # 1e999 is written without a name


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(word, str) for word in value.values()):
        raise SpectralAdapterError("__metadata__ is not a table of words")
    return value


def is_count(value: object, most: int = 2**48) -> bool:
    """A whole number 0 … most (True is none)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _entry(name: str, value: Any) -> Entry:
    """One tensor's header, with its number of bytes equal to what its shape and dtype need."""
    if len(name) > MAX_NAME:
        raise SpectralAdapterError(f"a tensor's name of {len(name)} letters, allowed are {MAX_NAME}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise SpectralAdapterError(f"tensor {name!r}: expected exactly dtype, shape and data_offsets")
    dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SpectralAdapterError(
            f"tensor {name!r}: unknown dtype {dtype!r:.40}, expected one of {', '.join(DTYPES)}"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(is_count, shape)):
        raise SpectralAdapterError(
            f"tensor {name!r}: shape {shape!r:.200}, expected at most {MAX_DIMENSIONS} whole numbers"
        )
    if not isinstance(place, list) or len(place) != 2 or not all(map(is_count, place)):
        raise SpectralAdapterError(
            f"tensor {name!r}: data_offsets {place!r:.200}, expected two whole numbers"
        )
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if place[1] - place[0] != needed:
        raise SpectralAdapterError(
            f"tensor {name!r}: {dtype} of shape {shape} needs {needed} bytes, data_offsets {place} give "
            f"{place[1] - place[0]}"
        )
    return Entry(DTYPES[dtype], tuple(shape), place[0], place[1])


def _check_places(entries: Mapping[str, Entry], available: int) -> None:
    """The tensors lie one behind the other and fill the file: no overlap, no gap, nothing behind."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise SpectralAdapterError(
                f"tensor {name!r} begins at byte {entry.start}, expected {position}: an overlap or a gap"
            )
        position = entry.stop
    if position != available:
        raise SpectralAdapterError(
            f"the tensors need {position} bytes, the file has {available}: truncated or padded"
        )


def _refuse_missing(path: Path) -> None:
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, a zero byte in it
        raise SpectralAdapterError(f"{str(path)!r:.300}: cannot be a file name ({error})") from error
    if is_folder:
        raise SpectralAdapterError(f"{path}: is a folder, expected a .safetensors file in it")
    if not exists:
        raise SpectralAdapterError(f"{path}: no such file{foreign.near_names(path)}")
    refuse_special(path)


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise SpectralAdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise SpectralAdapterError(f"{path}: is larger than the memory that is free") from error
