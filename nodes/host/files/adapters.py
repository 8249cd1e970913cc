"""Adapters from the host's folders: the file that a name means, parsed once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.analysis.spectra import summary_text
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.files import adapter_file as fileformat
from ....spectral_core.files.lazy_tensors import whole_file
from . import metadata, names, paths
from . import parsed_cache as store
from .reread import shelved


@dataclass(frozen=True)
class Opened:
    """An adapter from a file, a summary of it, and what the user should know about it.

    Whoever opened it holds on to this: the same file is then not read again.
    """

    adapter: Adapter
    path: Path
    summary: str
    notes: tuple[str, ...] = ()
    held: Any = None


@dataclass(frozen=True)
class _Read:
    """What stays the same while a file does. Its adapter sets its tensors down, so the summary, which looks
    at them, is written when they have just been read."""

    adapter: Adapter
    summary: str
    notes: tuple[str, ...]


def state_of(name: str, key: str = paths.KEY) -> str:
    """Which state of which file a name stands for; the same until the file changes."""
    try:
        return str(store.Stamp.of(paths.resolve(name, key, may_hash=True).path))
    except SpectralAdapterError as error:
        return f"{error}"


def problem_with(name: object, key: str = paths.KEY) -> str:
    """Why a workflow's file name cannot be used here; empty where it can. Nothing is opened."""
    if not isinstance(name, str):
        return ""  # it comes over a link and is not known yet
    try:
        paths.resolve(name, key)
    except paths.NotHashed:
        return ""  # told when the node runs
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
    found = paths.resolve(name, may_hash=True)
    path = found.path
    metadata.file_opened(path)
    notes = (found.note,) if found.note else ()
    header = store.HEADERS.get("header", path, lambda: fileformat.inspect(path))
    if not header.is_compact:
        read = store.ADAPTERS.get("adapter", path, lambda: _read(path))
    elif model is None and clip is None:
        raise SpectralAdapterError(
            f"{path}: is a compact file, which leaves out the singular vectors of its base model: "
            "connect the model (and clip) that it was trained on"
        )
    else:
        from ..model import base_weights

        owners = [
            owner for owner in (base_weights.owner(model), base_weights.owner(clip)) if owner is not None
        ]
        read = store.ADAPTERS.get("compact", path, lambda: _read_compact(path, header, model, clip), owners)
    return Opened(read.adapter, path, read.summary, notes + read.notes, read)


def _read(path: Path) -> _Read:
    again = whole_file(path)  # before it is read: what changes in between is noticed
    loaded = fileformat.read(path)
    text = summary_text(loaded.adapter)
    return _Read(shelved(loaded.adapter, again), text, loaded.notes)


def _read_compact(path: Path, header: fileformat.Summary, model: Any, clip: Any) -> _Read:
    """Its bases come from the model by an SVD: they are kept."""
    from ..model import base_weights

    shapes = {layer: plan.shape for layer, plan in header.layers.items()}
    loaded = fileformat.read(path, base_weights.source(shapes, model, clip))
    return _Read(loaded.adapter, summary_text(loaded.adapter), loaded.notes)
