"""What goes into a fusion: the concepts, how strong each is, and every layer's terms side by side.

A concept's factor in a layer is weight · adapter strength · matching layer strengths; it multiplies the
term's own weight, so that fusing with weights equals stacking the adapters at those strengths.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..adapter.adapter import Adapter, Term, require_adapter
from ..adapter.schedule import Schedule
from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape
from ..statistics.moments import Placed, Statistics


@dataclass(frozen=True)
class Concept:
    """One adapter of a fusion; ``factor`` is what a schedule that could be folded away multiplies it by.

    ``place``: its number among the adapters that were given, from 0; statistics are found by it.
    """

    label: str
    adapter: Adapter
    weight: float
    factor: float = 1.0
    place: int = 0

    def strength_of(self, layer: str) -> float:
        return self.weight * self.factor * self.adapter.strength_of(layer)


@dataclass(frozen=True)
class Source:
    """One term of one concept; ``strength`` includes everything but the term's own weight.

    ``adapter`` and ``index``: the numbers of its concept and, in its layer, of the term.
    """

    concept: str
    term: Term
    strength: float
    adapter: int = 0
    index: int = 0

    @property
    def weight(self) -> float:
        """The strength at which this term counts."""
        return self.strength * self.term.weight

    def kept(self) -> Term:
        """The term itself at this strength: exact for every method and every law of strength."""
        return replace(self.term, weight=self.weight)

    def placed(self) -> Placed:
        """The term with its place, for :mod:`..statistics.moments`."""
        return Placed(self.term, self.strength, self.adapter, self.index)


@dataclass(frozen=True)
class LayerSources:
    """A layer's terms from all concepts; ``concepts`` counts the whole fusion, also those without this
    layer.

    ``inputs``: statistics of the layer's inputs by the concept's place, the base model's at -1; empty where
    they are not known for all concepts.
    """

    name: str
    shape: LayerShape
    sources: tuple[Source, ...]
    concepts: int
    inputs: Mapping[int, Statistics] = field(default_factory=dict)


def labels_of(adapters: Sequence[Adapter]) -> list[str]:
    """A name for each adapter, its own or its place, made unique by a number behind it."""
    names = [a.provenance.name or f"concept {i + 1}" for i, a in enumerate(adapters)]
    doubled = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name} ({i + 1})" if name in doubled else name for i, name in enumerate(names)]


def concepts_of(
    adapters: Sequence[Adapter], weights: Sequence[float] | None
) -> tuple[list[Concept], Schedule | None]:
    """The concepts that count (weight · strength ≠ 0) and the schedule that the fused adapter keeps."""
    if not isinstance(adapters, Sequence) or not adapters:
        raise SpectralAdapterError("nothing to fuse: expected at least one adapter")
    for index, adapter in enumerate(adapters):
        require_adapter(adapter, f"input {index + 1} of the fusion")
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise SpectralAdapterError(
            f"{len(weights)} weights for {len(adapters)} adapters: expected one for each"
        )
    for label, weight in zip(labels_of(adapters), weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise SpectralAdapterError(f"weight {weight!r} of {label}: expected a finite number")
    concepts = [
        Concept(label, adapter, float(weight), place=place)
        for place, (label, adapter, weight) in enumerate(
            zip(labels_of(adapters), adapters, weights, strict=True)
        )
        if weight != 0 and adapter.strength != 0
    ]
    if not concepts:
        raise SpectralAdapterError("every weight or strength is 0: nothing is left to fuse")
    return _with_one_schedule(concepts)


def _with_one_schedule(concepts: list[Concept]) -> tuple[list[Concept], Schedule | None]:
    """Multiples of one schedule become that schedule and a factor each, which is exact; others are refused.

    A constant schedule is a multiple of none at all.
    """
    shared = next((c for c in concepts if not _is_constant(c.adapter.schedule)), None)
    schedule = None if shared is None else shared.adapter.schedule
    unit = Schedule(((0.0, 1.0),)) if schedule is None else schedule
    scaled = []
    for concept in concepts:
        factor = _multiple(concept.adapter.schedule, unit)
        if factor is None:
            assert shared is not None  # without one, all are constant
            raise SpectralAdapterError(
                f"{shared.label} and {concept.label} have different strength schedules, and one adapter "
                "holds one: give both the same (adapter.with_schedule(…)), remove them "
                "(with_schedule(None)), or stack the adapters instead of fusing them"
            )
        scaled.append(replace(concept, factor=factor))
    return [c for c in scaled if c.factor != 0] or scaled, schedule


def _is_constant(schedule: Schedule | None) -> bool:
    return schedule is None or len({multiplier for _, multiplier in schedule.points}) == 1


def _multiple(schedule: Schedule | None, unit: Schedule) -> float | None:
    """f with schedule = f · unit at every progress, or None."""
    if _is_constant(schedule) and _is_constant(unit):
        return (1.0 if schedule is None else schedule.points[0][1]) / unit.points[0][1]
    if schedule is None or [p for p, _ in schedule.points] != [p for p, _ in unit.points]:
        return None
    values, units = ([m for _, m in s.points] for s in (schedule, unit))
    peak = max(range(len(units)), key=lambda i: abs(units[i]))
    factor = values[peak] / units[peak]
    fits = all(
        math.isclose(v, factor * u, rel_tol=1e-9, abs_tol=1e-12) for v, u in zip(values, units, strict=True)
    )
    return factor if fits else None


def layers_of(concepts: Sequence[Concept]) -> list[LayerSources]:
    """Every layer that any concept changes, in the order in which it first appears; terms of weight 0 are
    left out.

    Raises where two concepts disagree about a layer's shape, which means different base models.
    """
    shapes: dict[str, tuple[str, LayerShape]] = {}
    found: dict[str, list[Source]] = {}
    for concept in concepts:
        for name, layer in concept.adapter.layers.items():
            first, shape = shapes.setdefault(name, (concept.label, layer.shape))
            if shape != layer.shape:
                raise SpectralAdapterError(
                    f"layer {name} is {shape} in {first} and {layer.shape} in {concept.label}: these "
                    "adapters belong to different base models and cannot be fused"
                )
            sources = [
                Source(concept.label, term, concept.strength_of(name), concept.place, index)
                for index, term in enumerate(layer.terms)
            ]
            found.setdefault(name, []).extend(s for s in sources if s.weight != 0)
    return [LayerSources(n, shapes[n][1], tuple(s), len(concepts)) for n, s in found.items() if s]
