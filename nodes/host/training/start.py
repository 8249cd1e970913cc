"""The adapter that a training in the host begins with: a new one, or one that is connected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ....spectral_core.adapter.adapter import Adapter, Provenance
from ....spectral_core.maths.svd_cache import SVDCache, default_cache_folder
from ....spectral_core.training.engine.checks import fitting
from ....spectral_core.training.engine.columns import basis_source
from ....spectral_core.training.engine.named_run import Reserve, new_adapter
from . import layers as training_layers
from . import text as training_text
from .job import Job
from .layers import BaseWeights
from .progress import check_interrupt


@dataclass(frozen=True)
class Origin:
    """The MODEL, an adapter to go on with (or None), the weights of the layers that train, their
    fingerprint."""

    model: Any
    adapter: Adapter | None
    weights: BaseWeights
    base: Mapping[str, Any]


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


def begin(job: Job, origin: Origin, name: str, reserve: Reserve) -> tuple[Adapter, list[str]]:
    """The adapter that the run begins with."""
    provenance = Provenance(name=name, family=family_of(origin.model), base=origin.base)
    if word := job.trigger_word.strip():
        provenance = replace(provenance, trigger_words=(word,))
    if origin.adapter is not None:
        words = provenance.trigger_words or origin.adapter.provenance.trigger_words
        return replace(origin.adapter, provenance=replace(provenance, trigger_words=words)), []
    weights = origin.weights
    cache = SVDCache(default_cache_folder())
    basis_of = partial(basis_source, cache=cache, between=check_interrupt)  # the stop button
    with torch.inference_mode(False), torch.no_grad():
        return new_adapter(
            job, weights.without_numbers(), provenance, job.config.seed, reserve, basis_of, weights.only
        )


def family_of(model: Any) -> str:
    """As the files of the command name it; for other families the host's own name."""
    config = model.model.model_config
    if config.unet_config.get("adm_in_channels") == 2816:
        return "sdxl"
    width = config.unet_config.get("context_dim")
    own = type(config).__name__.strip("_").lower()
    return {768: "sd1", 1024: "sd2", 128: "mini"}.get(width, own) if isinstance(width, int) else own
