"""What other programs read in a file's header: ``modelspec.*`` (Stability's model specification) and kohya's
``ss_*``.

LoRA managers and the host's metadata view show these. Everything that this project needs itself is in its own
entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone

from ..adapter.adapter import Adapter
from ..errors import SpectralAdapterError
from ..methods import METHODS, MethodConfig
from .container import strict_json

IMPLEMENTATION = "comfyui-spectral-adapters"
_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_KOHYA_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_TRAINING = {  # provenance.training -> kohya's word, where a run has recorded it under this name
    "steps": "ss_steps",
    "epochs": "ss_num_epochs",
    "learning_rate": "ss_learning_rate",
    "batch_size": "ss_total_batch_size",
    "images": "ss_num_train_images",
    "seed": "ss_seed",
    "optimizer": "ss_optimizer",
    "resolution": "ss_resolution",
    "base_name": "ss_sd_model_name",
}

# provenance.training -> where other programs look for the base model; carried on from imported files.
BASE = {"base_architecture": "modelspec.architecture", "base_version": "ss_base_model_version"}


def describe(adapter: Adapter, title: str, network_module: str, adapter_kind: str) -> dict[str, str]:
    """The shown metadata. ``network_module`` and ``adapter_kind`` say what the file's tensors are."""
    provenance = adapter.provenance
    methods = ", ".join(METHODS[method].config.title for method in adapter.methods)
    found = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": provenance.name or title,
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.description": f"{methods}, {len(adapter.layers)} layers",
        "ss_network_module": network_module,
        "ss_output_name": provenance.name or title,
    }
    architecture = _ARCHITECTURES.get(provenance.family, provenance.family)
    if architecture:
        found["modelspec.architecture"] = f"{architecture}/{adapter_kind}"
    if words := provenance.trigger_words:
        found["modelspec.trigger_phrase"] = ", ".join(words)
        found["trained_words"] = json.dumps(list(words), ensure_ascii=False)
        images = provenance.training.get("images", 1)  # how often a word was seen, which sorts the lists
        counts = {word: images if isinstance(images, int) else 1 for word in words}
        found["ss_tag_frequency"] = json.dumps({found["ss_output_name"]: counts}, ensure_ascii=False)
    if provenance.family in _KOHYA_VERSIONS:
        found["ss_base_model_version"] = _KOHYA_VERSIONS[provenance.family]
    for ours, theirs in BASE.items():
        if ours in provenance.training and theirs not in found:
            found[theirs] = str(provenance.training[ours])
    for ours, theirs in _TRAINING.items():
        if ours in provenance.training:
            found[theirs] = str(provenance.training[ours])
    return found | _rank_and_alpha(adapter)


_MOST_TAGS = 5


def trained_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The words that call what a file holds, from wherever programs write them: ``modelspec.trigger_phrase``
    with commas, ``trained_words`` as JSON or with commas; where there is neither, the most frequent tags of
    ``ss_tag_frequency``.
    """
    text = metadata.get("modelspec.trigger_phrase") or metadata.get("trained_words") or ""
    try:
        listed = strict_json(text) if text.startswith("[") else None
    except SpectralAdapterError:
        listed = None
    words = (
        [word for word in listed if isinstance(word, str)] if isinstance(listed, list) else text.split(",")
    )
    found = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    return found or _most_frequent(metadata.get("ss_tag_frequency", ""))


def _most_frequent(text: str) -> tuple[str, ...]:
    """The tags that every picture of their folder has, as far as kohya's counts tell: as frequent as any."""
    try:
        folders = strict_json(text) if text.startswith("{") else {}
    except SpectralAdapterError:
        return ()
    found: dict[str, None] = {}
    for tags in folders.values() if isinstance(folders, dict) else ():
        counts = {t: n for t, n in tags.items() if isinstance(n, int)} if isinstance(tags, dict) else {}
        most = max(counts.values(), default=0)
        found |= dict.fromkeys(t.strip() for t, n in counts.items() if n == most and t.strip())
    return tuple(found)[:_MOST_TAGS]


def _rank_and_alpha(adapter: Adapter) -> dict[str, str]:
    """kohya's dim and alpha: the layers' own where they agree, the largest rank and ``Dynamic`` where not."""
    configs = [term.config for layer in adapter.layers.values() for term in layer.terms]
    if not configs:
        return {}
    ranks, alphas = {config.rank for config in configs}, {_alpha(config) for config in configs}
    alpha = f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic"
    return {"ss_network_dim": str(max(ranks)), "ss_network_alpha": alpha}


def _alpha(config: MethodConfig) -> float:
    return round(config.scale * config.rank, 6)
