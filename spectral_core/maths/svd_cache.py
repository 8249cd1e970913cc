"""An on-disk cache of singular columns, keyed by the content of the weight.

Key: SHA-256 over every byte of the weight, its shape and dtype, the columns, the solver's settings and
ALGORITHM. A cryptographic hash of all bytes is affordable (0.7 to 1.5 GB/s per core with the SHA instructions
of current processors; the megabyte pieces are hashed by several threads, hashlib releases the lock), so
nothing weaker stands in for it: a single changed element changes its piece's digest and thereby the key, and
two weights share an entry only if SHA-256 collides. The weight's name and file play no part.

Entries are safetensors files that carry a digest of their own content. They are written to a temporary file
in the same folder, synced and renamed, so a reader sees a whole entry or none, and two processes that share
the folder at worst compute one entry twice. An entry that is truncated, damaged or belongs to another key is
removed and rebuilt. The least recently used entries go when the folder outgrows its bound. A folder that
cannot be written costs speed only; ``CacheReport.problem`` says so.

Shapes: weight (m, n) or (out, in, kh, kw); an entry holds u (m, r), s (r,), v (n, r) in float32.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ..errors import SpectralAdapterError
from ..whole_file import SUFFIX as WRITING
from ..whole_file import write_whole
from .svd import OVERSAMPLE, TOLERANCE, Columns, SVDColumns, as_matrix, select_columns

ALGORITHM = "3"  # raise it when the solvers change what they return
SUFFIX = ".svd.safetensors"
PIECE = 1 << 20  # bytes hashed at a time
DEFAULT_MAX_BYTES = 1 << 30
STALE_SECONDS = 3600.0  # a temporary file this old was left by a process that died
SOLVERS = ("randomised", "gram", "full")


@dataclass(frozen=True)
class CacheReport:
    """What the cache has done so far.

    Attributes:
        hits: entries served from disk.
        misses: columns computed, the rebuilt ones included.
        rebuilt: entries found damaged and removed.
        evicted: entries removed to keep the folder within its bound.
        problem: why the folder could not be written the last time it was tried; empty when all is well.
    """

    hits: int = 0
    misses: int = 0
    rebuilt: int = 0
    evicted: int = 0
    problem: str = ""


def default_cache_folder() -> Path:
    """$SPECTRAL_ADAPTERS_CACHE, or ``spectral_adapters`` in the user's cache folder of the system."""
    chosen = os.environ.get("SPECTRAL_ADAPTERS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    system = os.environ.get(variable)
    return (Path(system) if system else Path.home() / ".cache") / "spectral_adapters"


def content_key(weight: Tensor, columns: Columns) -> str:
    """The name of a weight's entry: 64 hexadecimal digits."""
    with torch.inference_mode(False), torch.no_grad():
        matrix = as_matrix(weight)
        raw = matrix.cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
    settings = [ALGORITHM, OVERSAMPLE, TOLERANCE, columns.resolve(min(matrix.shape))]
    description = json.dumps([*settings, list(weight.shape), str(weight.dtype)])
    return hashlib.sha256(description.encode() + _pieces_digest(raw)).hexdigest()


def _pieces_digest(raw: np.ndarray) -> bytes:
    """The digests of all pieces, in order."""
    pieces = [raw[start : start + PIECE].data for start in range(0, raw.size, PIECE)]
    if len(pieces) == 1:
        return hashlib.sha256(pieces[0]).digest()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(pieces))) as pool:
        return b"".join(pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces))


class SVDCache:
    """Singular columns from a folder, computed and stored when they are not there.

    Args:
        folder: created on the first write.
        max_bytes: bound on the folder's entries.
    """

    def __init__(self, folder: Path | str, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        if max_bytes < 0:
            raise SpectralAdapterError(f"cache size: found {max_bytes} bytes, expected 0 or more")
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._counts = {"hits": 0, "misses": 0, "rebuilt": 0, "evicted": 0}
        self._problem = ""

    @property
    def report(self) -> CacheReport:
        return CacheReport(**self._counts, problem=self._problem)

    def get_or_compute(
        self, weight: Tensor, columns: Columns, *, device: torch.device | str | None = None
    ) -> SVDColumns:
        """The columns of select_columns(weight, columns), on the weight's device.

        Raises:
            SpectralAdapterError: what select_columns refuses. Never for a trouble with the folder.
        """
        key = content_key(weight, columns)
        path = self.folder / f"{key}{SUFFIX}"
        matrix = as_matrix(weight)
        stored = self._read(path, key, (matrix.shape[0], matrix.shape[1]), columns)
        if stored is not None:
            self._counts["hits"] += 1
            return _on_device(stored, weight.device)
        self._counts["misses"] += 1
        computed = select_columns(weight, columns, device=device)
        self._write(path, _encode(computed, key))
        return computed

    def _read(self, path: Path, key: str, shape: tuple[int, int], columns: Columns) -> SVDColumns | None:
        try:
            data = path.read_bytes()
        except OSError:  # not there, or taken away by another process
            return None
        try:
            found = _decode(data, key, shape, columns.resolve(min(shape)))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._counts["rebuilt"] += 1
            _remove(path)
            return None
        _touch(path)
        return found

    def _write(self, path: Path, data: bytes) -> None:
        if len(data) > self.max_bytes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as trouble:
            self._problem = f"cannot write to {self.folder}: {trouble.strerror or trouble}"
            return
        try:
            write_whole(path, data)
            self._problem = ""
        except OSError as trouble:  # a full disk; on Windows also an entry that another process is reading
            self._problem = f"cannot write {path}: {trouble.strerror or trouble}"
        self._evict(keep=path.name)

    def _evict(self, keep: str) -> None:
        """Remove the entries used longest ago until the rest fits, and temporary files of dead processes."""
        entries, now = [], time.time()
        for path in self.folder.glob("*"):
            try:
                status = path.stat()
            except OSError:
                continue
            if path.name.endswith(SUFFIX):
                entries.append((path.name != keep, -status.st_mtime_ns, status.st_size, path))
            elif path.name.endswith((WRITING, ".tmp")) and now - status.st_mtime > STALE_SECONDS:
                _remove(path)
        total = 0
        # Newest first, and the entry just written before all others whatever the clock says.
        for _, _, size, path in sorted(entries):
            total += size
            if total > self.max_bytes:
                self._counts["evicted"] += _remove(path)


def _encode(found: SVDColumns, key: str) -> bytes:
    tensors = {name: getattr(found, name).cpu().contiguous() for name in "usv"}
    facts = {"key": key, "solver": found.solver, "residual": repr(found.residual)}
    return save_safetensors(tensors, {**facts, "sha256": _digest(tensors, facts)})


def _decode(data: bytes, key: str, shape: tuple[int, int], columns: tuple[int, ...]) -> SVDColumns:
    """The entry; one of the errors that ``_read`` expects when it is not what it should be."""
    tensors = load_safetensors(data)
    # The header was parsed by safetensors a moment ago; only its metadata is not handed out by load.
    facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    digest = facts.pop("sha256")
    m, n, r = *shape, len(columns)
    expected = {"u": (m, r), "s": (r,), "v": (n, r)}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise ValueError("shapes")
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise ValueError("dtype")
    if facts["key"] != key or facts["solver"] not in SOLVERS or digest != _digest(tensors, facts):
        raise ValueError("content")
    return SVDColumns(
        tensors["u"], tensors["s"], tensors["v"], columns, facts["solver"], float(facts["residual"])
    )


def _digest(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    hasher = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        hasher.update(tensors[name].view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _on_device(found: SVDColumns, device: torch.device) -> SVDColumns:
    u, s, v = found.u.to(device), found.s.to(device), found.v.to(device)
    return SVDColumns(u, s, v, found.columns, found.solver, found.residual)


def _remove(path: Path) -> bool:
    """Whether the file was there and is gone now; another process may have been faster."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _touch(path: Path) -> None:
    """Mark as used now. A folder that cannot be written keeps its order, which only affects eviction."""
    try:
        os.utime(path)
    except OSError:
        return
