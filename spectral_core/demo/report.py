"""What the demo leaves behind: the contact sheet, two plots, report.json, and the same numbers on the
screen."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..analysis.spectra import layer_spectra
from ..pipelines.loading import EMBEDDED
from ..plots import contact_sheet, heatmap, line_plot, save_picture
from ..training.data.folder import Example, find_examples, load_pictures
from ..whole_file import write_whole
from .concepts import DemoConcept
from .run import (
    METHOD_NAMES,
    DemoSettings,
    Row,
    TrainedAdapter,
    columns,
    columns_together,
    own_columns,
)
from .scores import Scorer


def write_report(
    output: Path,
    concepts: Sequence[DemoConcept],
    trained: Sequence[TrainedAdapter],
    rows: Sequence[Row],
    settings: DemoSettings,
    started: float,
) -> dict[str, Any]:
    """Draw, score, write and print; returns what report.json holds."""
    prompts, seeds = columns(concepts, settings)
    scorer = Scorer(EMBEDDED)
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "settings": {
            "size": settings.size,
            "rank": settings.rank,
            "targets": settings.targets,
            "sample_steps": settings.sample_steps,
            "guidance": settings.guidance,
        },
        "prompts": prompts,
        "seeds": seeds,
        "trainings": [training_record(t) for t in trained],
        "concepts": concept_scores(scorer, concepts, rows, settings),
        "both_named": both_named(scorer, concepts, rows, settings),
        "fusions": [fusion_record(row, concepts) for row in rows if row.fusion is not None],
    }
    files = draw(output, concepts, rows, trained, prompts, settings)
    report["files"] = {path.name: path.stat().st_size for path in files}
    report["seconds"] = time.perf_counter() - started
    write_whole(output / "report.json", json.dumps(report, indent=1))
    print(as_text(report))
    print(
        f"\nwritten to {output}: {', '.join(p.name for p in files)}, report.json ({report['seconds']:.0f} s)"
    )
    return report


def training_record(trained: TrainedAdapter) -> dict[str, Any]:
    known = {"concept": trained.concept.token, "method": trained.method, "reused": trained.reused}
    return known | trained.record | {"file": trained.path.name}


def concept_scores(
    scorer: Scorer, concepts: Sequence[DemoConcept], rows: Sequence[Row], settings: DemoSettings
) -> list[dict[str, Any]]:
    """Per concept: what its own pictures score among themselves, and what every row scores on its prompts."""
    found = []
    for position, concept in enumerate(concepts):
        own = own_columns(position, settings)
        scores = []
        for row in rows:
            pictures = [p for p in row.pictures[own] if p is not None]
            score: dict[str, Any] = {
                "row": row.label,
                "concept_score": scorer.concept_score(concept, pictures),
            }
            if scorer.knows(concept):
                score["named"] = scorer.named(concept, pictures)
            if settings.embedded:
                score["background_accuracy"] = scorer.background_accuracy(pictures)
            scores.append(score)
        found.append({"concept": concept.token, "own_pictures": scorer.own_score(concept), "rows": scores})
    return found


def both_named(
    scorer: Scorer, concepts: Sequence[DemoConcept], rows: Sequence[Row], settings: DemoSettings
) -> dict[str, float]:
    """Per row that draws both concepts in one picture: how often each is read in its half. Only of drawn
    characters, which the classifier knows, on the embedded model, which draws the first one left."""
    found: dict[str, float] = {}
    if not settings.embedded or not all(map(scorer.knows, concepts)):
        return found
    for row in rows:
        pictures = [p for p in row.pictures[columns_together(concepts, settings)] if p is not None]
        if pictures:
            found[row.label] = scorer.both_named(concepts, pictures)
    return found


def fusion_record(row: Row, concepts: Sequence[DemoConcept]) -> dict[str, Any]:
    """The fusion's settings, and how much of each concept's update survives on that concept's own
    activations."""
    assert row.fusion is not None
    kept = {c.token: value for c, value in zip(concepts, row.retention, strict=True)}
    ranks = [layer.rank_after for layer in row.fusion.layers]
    return {
        "row": row.label,
        "method": row.fusion.method,
        "layers": len(row.fusion.layers),
        "rank": max(ranks),
        "mergeable": row.fusion.mergeable,
        "retention": kept,
        "crosstalk": row.crosstalk,
        "warnings": list(row.fusion.warnings),
    }


def draw(
    output: Path,
    concepts: Sequence[DemoConcept],
    rows: Sequence[Row],
    trained: Sequence[TrainedAdapter],
    prompts: Sequence[str],
    settings: DemoSettings,
) -> list[Path]:
    """The three pictures."""
    pictures = {
        "contact_sheet.png": contact_sheet(
            [learned_from(concepts, settings), *(row.pictures for row in rows)],
            row_labels=["learned from", *(row.label for row in rows)],
            column_labels=list(prompts),
            title="The same prompts and seeds in every row but the first",
        ),
        "spectrum.png": spectrum_plot(trained),
    }
    if (gates := gate_plot(rows)) is not None:
        pictures["gate_heatmap.png"] = gates
    paths = []
    for name, picture in pictures.items():
        save_picture(picture, output / name)
        paths.append(output / name)
    return paths


def learned_from(concepts: Sequence[DemoConcept], settings: DemoSettings) -> list[Any]:
    """Above each column a picture that its concept was trained on, above those of all at once each concept's
    last one in turn; a gap where there are too few."""
    shown: list[Any] = []
    found = [find_examples(concept.folder, concept.token) for concept in concepts]

    def read(examples: list[Example]) -> list[Tensor]:
        return list(load_pictures(examples, settings.size, settings.size) / 2 + 0.5)

    for examples in found:
        first = examples[: settings.per_prompt]
        shown += [*read(first), *[None] * (settings.per_prompt - len(first))]
    together = len(columns(concepts, settings)[0]) - len(shown)
    return shown + read([found[i % len(found)][-1] for i in range(together)]) if together else shown


def gate_plot(rows: Sequence[Row]) -> Any | None:
    """Open gates per layer and noise level of the first FouRA row."""
    for row in rows:
        summary = row.recorder.summary() if row.recorder is not None else None
        if summary and summary["layers"]:
            bins = summary["bins"]
            return heatmap(
                summary["effective_rank"],
                row_labels=[name.removeprefix("unet.") for name in summary["layers"]],
                column_labels=[f"{i / bins:.1f}" for i in range(bins)],
                title=f"{row.label}: open gates (of {max(summary['ranks'])}); left noisy, right clean",
                low=0.0,
                high=float(max(summary["ranks"])),
            )
    return None


def spectrum_plot(trained: Sequence[TrainedAdapter]) -> Any:
    """σᵢ/σ₁ of ΔW, averaged over the layers that every adapter changes, for the first concept's adapters."""
    first = [t for t in trained if t.concept == trained[0].concept]
    series = {METHOD_NAMES[t.method]: mean_spectrum(t.adapter) for t in first}
    return line_plot(
        {name: (list(range(1, len(values) + 1)), values) for name, values in series.items()},
        x_label="singular value number",
        y_label="relative to the largest",
        title=f"Spectrum of the learned update for {trained[0].concept.token}, mean over layers",
    )


def mean_spectrum(adapter: Adapter) -> list[float]:
    """Mean over the layers of σᵢ/σ₁, zero where a layer's rank ends earlier."""
    relative = [
        [s / spectrum.singular_values[0] for s in spectrum.singular_values]
        for spectrum in layer_spectra(adapter).values()
        if spectrum.singular_values and spectrum.singular_values[0] > 0
    ]
    width = max((len(r) for r in relative), default=0)
    return [sum(r[i] if i < len(r) else 0.0 for r in relative) / len(relative) for i in range(width)]


def as_text(report: dict[str, Any]) -> str:
    """The report's numbers as a few aligned tables."""
    lines = [
        "",
        f"{'training':<28}{'loss before':>12}{'after':>10}{'seconds':>10}{'parameters':>12}{'file KB':>10}",
    ]
    for t in report["trainings"]:
        label = f"{METHOD_NAMES[t['method']]} {t['concept']}" + (" (reused)" if t["reused"] else "")
        lines.append(
            f"{label:<28}{t['loss_before']:>12.4f}{t['loss_after']:>10.4f}{t['seconds']:>10.1f}"
            f"{t['parameters']:>12,}{t['bytes'] / 1000:>10.0f}"
        )
    for concept in report["concepts"]:
        lines += [
            "",
            f"{concept['concept']}: its own pictures score {concept['own_pictures']:.3f} among themselves",
        ]
        for row in concept["rows"]:
            background = row.get("background_accuracy")
            asked = "" if background is None else f"   background as asked {background:.0%}"
            named = f"   named {row['named']:>4.0%}" if "named" in row else ""
            lines.append(f"  {row['row']:<26} concept score {row['concept_score']:>6.3f}{named}{asked}")
    if report["both_named"]:
        lines += ["", "both in one picture, each read in its half:"]
        lines += [f"  {row:<26} {share:>4.0%}" for row, share in report["both_named"].items()]
    for fusion in report["fusions"]:
        kept = ", ".join(
            f"{token} {value:.3f}" for token, value in fusion["retention"].items() if value is not None
        )
        lines += ["", f"{fusion['row']} ({fusion['method']}, rank {fusion['rank']}): retention {kept}"]
    return "\n".join(lines)
