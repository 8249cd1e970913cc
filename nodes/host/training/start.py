"""The adapter that a training in the host begins with: a new one, or one that is connected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....spectral_core.adapter.adapter import Adapter, Provenance, create
from ....spectral_core.files.adapter_file import load, save
from ....spectral_core.maths.svd import Columns
from ....spectral_core.maths.svd_cache import SVDCache, default_cache_folder
from ....spectral_core.methods import Basis, MethodConfig, method_of
from ....spectral_core.training.engine.checks import fitting
from ....spectral_core.training.engine.columns import reserve
from ....spectral_core.training.runs.place import Place
from . import layers as training_layers
from . import text as training_text
from .job import Job
from .layers import BaseWeights
from .progress import check_interrupt

START = "start.safetensors"


@dataclass(frozen=True)
class Origin:
    """The MODEL, an adapter to go on with (or None), the weights of the layers that train, their
    fingerprint, and the folder of the finished adapters, which are the ledger of the columns."""

    model: Any
    adapter: Adapter | None
    weights: BaseWeights
    base: Mapping[str, Any]
    folder: Path


def layers(job: Job, model: Any, clip: Any) -> tuple[Adapter | None, BaseWeights, list[str]]:
    """The adapter to go on with (or None), the weights of the layers that train, what to say about them."""
    if job.continued is not None:
        adapter, shapes, notes = training_layers.fitted(job.continued, model)
        notes.append(
            "method, rank, columns and layers are those of the connected adapter; its learning starts afresh"
        )
        return adapter, BaseWeights(model, shapes), notes
    (chosen, share), text = training_layers.chosen(model, job.targets), None
    beside: list[str] = []
    if job.text_targets.strip():
        chosen, text = chosen | training_text.choose(clip, job.text_targets.strip()), clip
        beside = training_text.stay(clip)
    weights = BaseWeights(model, chosen, text)
    method = job.method_config(job.columns or tuple(range(job.rank)))
    kept, notes = fitting(weights.without_numbers(), method)
    return None, weights.only(kept), [f"targets {job.targets}: {share}", *beside, *notes]


def begin(
    around: ExitStack, job: Job, origin: Origin, place: Place, result: Path
) -> tuple[Adapter, list[str]]:
    """The adapter that the run begins with: made once, with its columns reserved while it trains."""
    path = place.folder / START
    if path.is_file():
        adapter = load(path)
        if columns := _columns(adapter):
            held = around.enter_context(reserve(origin.folder, origin.base, columns, place.name))
            return adapter, [note for note in held.notes if f"taken by {result.name}" not in note]
        return adapter, []
    provenance = Provenance(name=place.name, family=family_of(origin.model), base=origin.base)
    if word := job.trigger_word.strip():
        provenance = replace(provenance, trigger_words=(word,))
    notes: list[str] = []
    if origin.adapter is not None:
        words = provenance.trigger_words or origin.adapter.provenance.trigger_words
        adapter = replace(origin.adapter, provenance=replace(provenance, trigger_words=words))
    else:
        chosen = job.columns
        if job.needs_columns:
            held = around.enter_context(
                reserve(origin.folder, origin.base, job.columns or job.rank, place.name)
            )
            chosen, notes = held.columns, list(held.notes)
        method = job.method_config(chosen or tuple(range(job.rank)))
        kept, more = fitting(origin.weights.without_numbers(), method)
        notes += [line for line in more if chosen != job.columns]
        usable = origin.weights.only(kept)
        generator = torch.Generator().manual_seed(job.config.seed)
        adapter = create(usable, method, _basis_source(method), generator, provenance)
    save(adapter, path)
    return adapter, notes


def _columns(adapter: Adapter) -> tuple[int, ...]:
    found = (t.config.singular_columns for layer in adapter.layers.values() for t in layer.terms)
    return tuple(sorted({c for columns in found for c in columns}))


def _basis_source(method: MethodConfig) -> Callable[[str, Tensor], Basis] | None:
    """Singular columns from the cache on disk; the stop button works between two layers."""
    if not method_of(method).needs_basis:
        return None
    cache, columns = SVDCache(default_cache_folder()), Columns.listed(method.columns)  # type: ignore[union-attr]

    def basis(_: str, weight: Tensor) -> Basis:
        check_interrupt()
        found = cache.get_or_compute(weight, columns)
        return found.u, found.s, found.v

    return basis


def family_of(model: Any) -> str:
    """As the files of the command name it; for other families the host's own name."""
    config = model.model.model_config
    if config.unet_config.get("adm_in_channels") == 2816:
        return "sdxl"
    width = config.unet_config.get("context_dim")
    own = type(config).__name__.strip("_").lower()
    return {768: "sd1", 1024: "sd2", 128: "mini"}.get(width, own) if isinstance(width, int) else own
