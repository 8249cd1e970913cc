"""Numbers about one adapter: the spectrum of ΔW per layer, its effective rank and size, a summary, its gates.

Spectra come from the factors (QR and a small SVD); no ΔW is built.

    effective rank  exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ/Σσ  (Roy & Vetterli, EUSIPCO 2007)
    stable rank     ‖ΔW‖_F² / ‖ΔW‖₂²              (Rudelson & Vershynin, J. ACM 2007)

Both lie between 1 and the rank and equal it when all σ are equal; the stable rank follows the largest ones.
What several adapters do to each other: :mod:`.interference`.

Shapes: singular values (k,) descending, k = min(rank, out, fan_in).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape
from ..maths.lowrank import compact_svd, concatenate
from ..methods import MethodConfig, config_to_dict
from ..names.layer_name import LayerName
from ..words import OneLine


@dataclass(frozen=True, repr=False)
class LayerSpectrum(OneLine):
    """ΔW of one layer at the adapter's strengths; ``relative_norm`` is ‖ΔW‖_F/‖W‖_F where W was given.

    ``gated``: an adaptive gate was taken with every row open, so the values are an upper end.
    """

    singular_values: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    norm: float
    spectral_norm: float
    relative_norm: float | None = None
    gated: bool = False


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of σ/Σσ; 0 where all are 0."""
    s = singular_values.detach().double()
    total = s.sum()
    if s.numel() == 0 or total == 0:
        return 0.0
    return float(torch.special.entr(s / total).sum().exp())


def stable_rank(singular_values: Tensor) -> float:
    """Σσ²/σ₁²; 0 where all are 0."""
    s = singular_values.detach().double()
    if s.numel() == 0 or s.max() == 0:
        return 0.0
    return float((s / s.max()).square().sum())


def layer_spectra(adapter: Adapter, weights: Mapping[str, Tensor] | None = None) -> dict[str, LayerSpectrum]:
    """The spectrum of every layer; ``weights`` are base weights by layer name, as far as there are some.

    Raises where a given weight has another shape than its layer.
    """
    return {name: _spectrum(adapter, name, (weights or {}).get(name)) for name in adapter.layers}


def _spectrum(adapter: Adapter, name: str, weight: Tensor | None) -> LayerSpectrum:
    layer = adapter.layers[name]
    strength = adapter.strength_of(name)
    _, s, _ = compact_svd(concatenate([term.factors(layer.shape, strength) for term in layer.terms]))
    s = s.detach().double().cpu()
    norm = float(s.square().sum().sqrt())
    relative = None
    if weight is not None:
        if LayerShape.of(weight) != layer.shape:
            raise SpectralAdapterError(
                f"layer {name}: the base weight is {LayerShape.of(weight)}, the adapter's layer "
                f"{layer.shape}; expected the model that the adapter was trained on"
            )
        size = float(weight.detach().double().norm())
        relative = norm / size if size else None
    return LayerSpectrum(
        singular_values=tuple(s.tolist()),
        effective_rank=effective_rank(s),
        stable_rank=stable_rank(s),
        norm=norm,
        spectral_norm=float(s.max()) if s.numel() else 0.0,
        relative_norm=relative,
        gated=not layer.mergeable,
    )


def summary(adapter: Adapter) -> dict[str, Any]:
    """What an adapter is, JSON-able: layers, configurations, parameters, strengths, words, parents."""
    provenance = adapter.provenance
    configs = Counter(
        tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in config_to_dict(term.config).items())
        for layer in adapter.layers.values()
        for term in layer.terms
    )
    return {
        "name": provenance.name,
        "family": provenance.family,
        "layers": len(adapter.layers),
        "layers_per_part": dict(Counter(LayerName.parse(name).part for name in adapter.layers)),
        "methods": list(adapter.methods),
        "configurations": [{**dict(config), "terms": count} for config, count in configs.most_common()],
        "parameters": adapter.parameter_count,
        "mergeable": adapter.mergeable,
        "strength": adapter.strength,
        "layer_strengths": [list(pair) for pair in adapter.layer_strengths],
        "schedule": [list(point) for point in adapter.schedule.points] if adapter.schedule else None,
        "trigger_words": list(provenance.trigger_words),
        "tokens": list(adapter.tokens),
        "parents": [parent.get("name", "") for parent in provenance.parents],
    }


def describe(config: MethodConfig) -> str:
    """A configuration in a few words: ``foura dct, adaptive gate, rank 8``."""
    return config.summary


def summary_text(adapter: Adapter) -> str:
    """The summary in a few lines for people."""
    facts = summary(adapter)
    counts = Counter(describe(term.config) for layer in adapter.layers.values() for term in layer.terms)
    parts = ", ".join(f"{count} in {part}" for part, count in facts["layers_per_part"].items())
    lines = [
        f"{facts['name'] or 'adapter'}: {facts['layers']} layers ({parts}), {facts['parameters']:,} "
        "parameters",
        *(f"{text}: {count} terms" for text, count in counts.most_common()),
        "merges into weights" if facts["mergeable"] else "applied live (adaptive gates or a schedule)",
    ]
    if adapter.strength != 1 or adapter.layer_strengths:
        layers = "".join(f", {pattern} × {value:g}" for pattern, value in adapter.layer_strengths)
        lines.append(f"strength {adapter.strength:g}{layers}")
    for key in ("trigger_words", "tokens", "parents"):
        if facts[key]:
            lines.append(f"{key.replace('_', ' ')}: {', '.join(facts[key])}")
    return "\n".join(lines)


def gate_summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Open shares from a gate recorder's ``summary()``: over all, per layer, and per noise level (noisiest
    first).

    A share is open gates / rank, 0 … 1; layers count by their rank, a noise level that was never seen is
    None.
    """
    ranks, means = record["ranks"], record["mean_effective_rank"]
    by_noise: list[float | None] = []
    for index in range(record["bins"]):
        seen = [
            (row[index], r)
            for row, r in zip(record["effective_rank"], ranks, strict=True)
            if row[index] is not None
        ]
        by_noise.append(sum(v for v, _ in seen) / sum(r for _, r in seen) if seen else None)
    return {
        "open_share": sum(means) / sum(ranks) if ranks else None,
        "per_layer": {n: m / r for n, m, r in zip(record["layers"], means, ranks, strict=True)},
        "by_noise": by_noise,
        "switching": sum(s * r for s, r in zip(record["switching"], ranks, strict=True)) / sum(ranks)
        if ranks
        else None,
        "always_open": list(record["always_open"]),
    }
