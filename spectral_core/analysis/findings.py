"""What there is to say about one adapter: its spectra, its gates, and whether it belongs to a base model.

Shapes: those of :mod:`.spectra` and of a gate recorder's summary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from torch import Tensor

from ..adapter import fingerprint
from ..adapter.adapter import Adapter
from ..adapter.schedule_words import describe as describe_schedule
from ..errors import SpectralAdapterError
from ..names.layer_name import LayerName
from ..words import OneLine
from .spectra import LayerSpectrum, gate_summary, layer_spectra, summary_text


@dataclass(frozen=True, repr=False)
class Findings(OneLine):
    """An adapter examined. ``record`` is a gate recorder's summary of a run, ``match`` the comparison of its
    base with given weights; ``trained_open`` the share of gates that training left open, by layer.
    """

    adapter: Adapter
    spectra: Mapping[str, LayerSpectrum]
    trained_open: Mapping[str, float]
    record: Mapping[str, Any] | None = None
    match: fingerprint.Match | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_relative(self) -> bool:
        """Whether sizes are relative to the base model's weights."""
        return any(spectrum.relative_norm is not None for spectrum in self.spectra.values())

    def size(self, name: str) -> float | None:
        """‖ΔW‖/‖W‖ of a layer where weights were given, else ‖ΔW‖; None where only others have weights."""
        spectrum = self.spectra[name]
        return spectrum.relative_norm if self.is_relative else spectrum.norm


def examine(
    adapter: Adapter,
    weights: Mapping[str, Tensor] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Findings:
    """Everything that numbers tell about an adapter; weights: of the base, by layer name, as far as known."""
    notes: list[str] = []
    match = None
    if weights and adapter.provenance.base:
        try:
            match = fingerprint.compare(adapter.provenance.base, weights)
        except SpectralAdapterError as error:
            notes.append(str(error))
    seen = record if record and record["layers"] else None
    return Findings(
        adapter, layer_spectra(adapter, weights), _trained_open(adapter), seen, match, tuple(notes)
    )


def _trained_open(adapter: Adapter) -> dict[str, float]:
    found = {}
    for name, layer in adapter.layers.items():
        shares = [t.params["gate.mean_open"] for t in layer.terms if "gate.mean_open" in t.params]
        if shares:
            found[name] = fmean(float(share.float().mean()) for share in shares)
    return found


def text(findings: Findings) -> str:
    """The findings for people, one to a line."""
    adapter = findings.adapter
    lines = [summary_text(adapter)]
    if adapter.provenance.family:
        lines.append(f"family: {adapter.provenance.family}")
    lines += _spectra_lines(findings) + _gate_lines(findings) + [_base_line(findings)]
    if adapter.schedule is not None:
        lines.append(describe_schedule(adapter.schedule))
    training = [f"{key} {value}" for key, value in adapter.provenance.training.items() if _is_short(value)]
    if training:
        lines.append(f"training: {', '.join(training[:10])}")
    return "\n".join([*lines, *findings.notes, f"content: {adapter.content_hash[:16]}"])


def _is_short(value: object) -> bool:
    return isinstance(value, int | float | str) and len(str(value)) < 60


def _spectra_lines(findings: Findings) -> list[str]:
    spectra = findings.spectra
    if not spectra:
        return []
    lines = []
    for part in findings.adapter.parts:
        names = [name for name in spectra if LayerName.parse(name).part == part]
        ranks = [len(spectra[name].singular_values) for name in names]
        effective = [spectra[name].effective_rank for name in names]
        lines.append(
            f"{part}: rank {min(ranks)} to {max(ranks)}, effective rank {median(effective):.1f} (median; "
            f"{min(effective):.1f} to {max(effective):.1f})"
        )
    sizes = {name: size for name in spectra if (size := findings.size(name)) is not None}
    unit = "of the weight" if findings.is_relative else "(Frobenius norm)"
    strongest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
    lines.append(
        f"size of the change {unit}: median {median(sizes.values()):.3g}, most in "
        + ", ".join(f"{name} {sizes[name]:.3g}" for name in strongest)
    )
    unchanged = [name for name, spectrum in spectra.items() if spectrum.norm == 0]
    if unchanged:
        lines.append(f"{len(unchanged)} layers change nothing, such as {unchanged[0]}")
    return lines


def _gate_lines(findings: Findings) -> list[str]:
    lines = []
    if findings.trained_open:
        lines.append(f"gates open on average in training: {fmean(findings.trained_open.values()):.0%}")
    if findings.record is None:
        return [*lines, "gates in a run: none recorded yet"] if findings.trained_open else lines
    gates = gate_summary(findings.record)
    levels = ", ".join("–" if share is None else f"{share:.0%}" for share in gates["by_noise"])
    lines.append(
        f"gates open in the last run: {gates['open_share']:.0%}; noisiest to cleanest: {levels}; "
        f"{gates['switching']:.0%} of them switch"
    )
    if always := gates["always_open"]:
        lines.append(f"{len(always)} layers never closed, such as {always[0]}")
    return lines


def _base_line(findings: Findings) -> str:
    base = findings.adapter.provenance.base
    if not base:
        return "base model: no fingerprint in the file"
    if findings.match is not None:
        return f"base model: the connected one is {findings.match}"
    count = len(base["layers"]) if isinstance(base.get("layers"), Mapping) else 0
    return f"base model: fingerprint of {count} layers in the file; connect a model to compare"
