"""What a fusion did, in numbers: for people (``text``), for files and nodes (``to_json``).

Errors are relative Frobenius norms, 0 … 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from ..plots import heatmap
from ..words import OneLine
from .activations import Kept
from .columns import ColumnUse


@dataclass(frozen=True)
class ConceptReport:
    """One concept that went in; ``strength`` is its adapter's own, beside the fusion's ``weight``.

    ``retention``: how much of it the fused adapter keeps on its own inputs, 1 all of it; None without
    statistics.
    """

    name: str
    weight: float
    strength: float
    methods: tuple[str, ...]
    layers: int
    retention: float | None = None


@dataclass(frozen=True, repr=False)
class LayerReport(OneLine):
    """One fused layer. ``form`` is the rule that was used there.

    ``norm`` ‖ΔW‖_F of what could be compressed and ``error`` the relative part of it that was lost, where
    compression was asked for; with statistics, both of the layer's output on them.

    ``kept``: each concept's output on its own inputs, alone and lost, where there are statistics.

    ``cross_terms``: ‖ΔW_spectral − ΣsᵢΔWᵢ‖/‖ΣsᵢΔWᵢ‖ where the form is spectral, else nothing.
    """

    name: str
    form: str
    concepts: tuple[str, ...]
    rank_before: int
    rank_after: int
    norm: float | None = None
    error: float = 0.0
    cross_terms: float | None = None
    kept: tuple[Kept, ...] = ()
    note: str = ""


@dataclass(frozen=True, repr=False)
class FusionReport(OneLine):
    """``error`` is over all compressed layers together: √(Σ‖lost‖²/Σ‖ΔW‖²)."""

    method: str
    concepts: tuple[ConceptReport, ...]
    layers: tuple[LayerReport, ...]
    error: float
    mergeable: bool
    columns: tuple[ColumnUse, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    @property
    def text(self) -> str:
        """A few lines for a terminal or a node."""
        strengths = ", ".join(f"{c.name} × {c.weight * c.strength:g}" for c in self.concepts)
        lines = [f"{self.method} of {strengths}", *self._layer_lines(), *map(str, self.columns)]
        if not self.mergeable:
            lines.append(
                "adaptive gates stay live, or a schedule is kept: applied live, not mergeable into weights"
            )
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def __str__(self) -> str:
        return self.text

    def pictures(self) -> dict[str, Image.Image]:
        """``retention``: every layer's, concept by concept; nothing without statistics."""
        shown = [layer for layer in self.layers if any(k.had for k in layer.kept)]
        if not shown:
            return {}
        by_name = [{k.concept: k.retention for k in layer.kept} for layer in shown]
        names = [c.name for c in self.concepts]
        matrix = [[row.get(name) for name in names] for row in by_name]
        title = f"What {self.method} keeps of each concept on its own inputs"
        return {
            "retention": heatmap(
                matrix, [layer.name for layer in shown], names, title, "{:.2f}", "retention", high=1.0
            )
        }

    def _layer_lines(self) -> list[str]:
        forms = Counter(layer.form for layer in self.layers)
        lines = [f"{len(self.layers)} layers: " + ", ".join(f"{n} by {form}" for form, n in forms.items())]
        before, after = (
            _span([x.rank_before for x in self.layers]),
            _span([x.rank_after for x in self.layers]),
        )
        if any(layer.rank_before != layer.rank_after for layer in self.layers):
            worst = max(self.layers, key=lambda layer: layer.error)
            lines.append(
                f"rank {before} → {after}, relative error {self.error:.2%} in total, at most "
                f"{worst.error:.2%} ({worst.name})"
            )
        else:
            lines.append(f"rank {after}, nothing compressed")
        crossed = [layer.cross_terms for layer in self.layers if layer.cross_terms is not None]
        if crossed:
            lines.append(
                f"cross terms: {_mean(crossed):.2%} of the sum on average, at most {max(crossed):.2%}"
            )
        kept = [(c.name, c.retention) for c in self.concepts if c.retention is not None]
        if kept:
            lines.append("retention on its own inputs: " + ", ".join(f"{n} {r:.1%}" for n, r in kept))
        notes = Counter(layer.note for layer in self.layers if layer.note)
        return lines + [f"{count} layers: {note}" for note, count in notes.most_common()]


def total_error(layers: Sequence[LayerReport]) -> float:
    """√(Σ‖lost‖² / Σ‖ΔW‖²) over the layers that compression looked at."""
    sizes = [(layer.norm or 0.0, layer.error) for layer in layers]
    total = sum(size**2 for size, _ in sizes)
    return float((sum((size * error) ** 2 for size, error in sizes) / total) ** 0.5) if total else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _span(values: list[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"
