"""What a file's header says about an adapter, for people who choose one: nothing of its tensors is read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.files import adapter_file
from ....spectral_core.files.container import open_safely
from ....spectral_core.files.cover import cover_of
from ....spectral_core.files.metadata import trained_words
from ..files import parsed_cache, paths

KINDS = {"adapter": paths.KEY, "lora": paths.LORAS}


def card(name: str, kind: str = "adapter") -> dict[str, Any]:
    """The card of a file by the name that its loader shows. Raises SpectralAdapterError as the loader."""
    path = paths.resolve(name, KINDS.get(kind, paths.KEY)).path
    found = parsed_cache.HEADERS.get("card", path, lambda: _read(path))
    return {**found, "name": name, "preview": preview_of(path) is not None}


def _read(path: Path) -> dict[str, Any]:
    state = path.stat()
    date = time.strftime("%Y-%m-%d", time.localtime(state.st_mtime))
    shown = {"file": path.name, "bytes": state.st_size, "date": date}
    if adapter_file.is_adapter_file(path):
        return {**shown, **_ours(path)}
    return {**shown, **_lora(path)}


def _ours(path: Path) -> dict[str, Any]:
    summary = adapter_file.inspect(path)
    training = summary.config.provenance.training or {}
    return {
        "method": list(summary.methods),
        "rank": sorted(set(summary.ranks)),
        "layers": len(summary.layers),
        "words": list(dict.fromkeys((*summary.trigger_words, *summary.tokens))),
        "base": summary.family,
        "steps": training.get("steps_done"),
    }


def _lora(path: Path) -> dict[str, Any]:
    file = open_safely(path)
    meta = file.metadata
    return {
        "method": ["lora"],
        "rank": [meta["ss_network_dim"]] if meta.get("ss_network_dim") else [],
        "layers": None,
        "words": list(trained_words(meta)),
        "base": meta.get("ss_base_model_version") or meta.get("modelspec.architecture") or "",
        "steps": meta.get("ss_steps"),
    }


def preview_of(path: Path) -> Path | None:
    """A picture beside the file, as managers of models keep it."""
    return cover_of(path)


def preview(name: str, kind: str = "adapter") -> Path:
    found = preview_of(paths.resolve(name, KINDS.get(kind, paths.KEY)).path)
    if found is None:
        raise SpectralAdapterError(f"{name}: has no preview picture")
    return found
