"""Adapters from the host's folders: the file that a name means, parsed once.

Shapes: those of the adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...spectral_core import fileformat
from ...spectral_core.adapter import Adapter
from ...spectral_core.errors import SpectralAdapterError
from . import names, paths, store


@dataclass(frozen=True)
class Opened:
    """An adapter from a file, and what the user should know about it."""

    adapter: Adapter
    path: Path
    notes: tuple[str, ...] = ()


def state_of(name: str, key: str = paths.KEY) -> str:
    """Which state of which file a name stands for; the same until the file changes."""
    try:
        return str(store.Stamp.of(paths.resolve(name, key).path))
    except SpectralAdapterError as error:
        return f"{error}"


def problem_with(name: object, key: str = paths.KEY) -> str:
    """Why a workflow's file name cannot be used here; empty where it can. Nothing is opened."""
    if not isinstance(name, str):
        return ""  # it comes over a link and is not known yet
    try:
        paths.resolve(name, key)
    except SpectralAdapterError as error:
        return str(error)
    return ""


def identity(name: str, path: Path) -> tuple[dict[str, str], ...]:
    """A file's name as the workflow has it, and its hash: for the page, which notes both in the workflow.

    Empty where no prompt has asked for the hash: loading does not wait for it.
    """
    sha256 = store.known_digest(path)
    return ({"name": names.key_of(name), "sha256": sha256},) if sha256 else ()


def open_adapter(name: str, model: Any = None, clip: Any = None) -> Opened:
    """The adapter of a file of ours. A compact file is completed with the weights of MODEL and CLIP.

    Raises SpectralAdapterError for a name without a file, a file that is not sound, and a compact file
    without its model.
    """
    found = paths.resolve(name)
    notes = (found.note,) if found.note else ()
    summary = store.PARSED.get("summary", found.path, lambda: fileformat.inspect(found.path))
    if not summary.is_compact:
        loaded = store.PARSED.get("adapter", found.path, lambda: fileformat.read(found.path))
        return Opened(loaded.adapter, found.path, notes + loaded.notes)
    if model is None and clip is None:
        raise SpectralAdapterError(
            f"{found.path}: is a compact file, which leaves out the singular vectors of its base model: "
            "connect the model (and clip) that it was trained on"
        )
    from . import base_weights

    shapes = {layer: plan.shape for layer, plan in summary.layers.items()}
    owners = [owner for owner in (base_weights.owner(model), base_weights.owner(clip)) if owner is not None]
    loaded = store.PARSED.get(
        "compact",
        found.path,
        lambda: fileformat.read(found.path, base_weights.source(shapes, model, clip)),
        owners,
    )
    return Opened(loaded.adapter, found.path, notes + loaded.notes)
