"""Adapter findings as one picture: sizes, effective ranks, spectra and gates, layer by layer.

Shapes: matrices are blocks × kinds of layers, or blocks × noise levels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from statistics import fmean

from PIL import Image

from ..names.layer_name import LayerName
from ..names.unet_blocks import halvings
from ..plots import abbreviate, heatmap, line_plot
from ..plots.compose import page
from .findings import Findings
from .findings import text as report_text
from .spectra import gate_summary

_PLACE = re.compile(
    r"(?P<block>.*(?:blocks|layers|attentions|resnets|downsamplers|upsamplers)\.\d+)\.(?P<kind>.+)"
)
_RESIDUAL = re.compile(
    r"resnets|samplers|conv_in|conv_out|time_emb|(in|out|emb)_layers|skip_connection|\.op$"
)
_SIDES = (("down_blocks", "input_blocks"), ("mid_block", "middle_block"), ("up_blocks", "output_blocks"))
_MAX_SPECTRA = 5


def draw(findings: Findings) -> Image.Image:
    """The sheet. Blocks come in the order in which a picture passes them; cells without a layer are crossed
    out.
    """
    pictures = []
    for part in findings.adapter.parts:
        names = [name for name in findings.adapter.layers if LayerName.parse(name).part == part]
        pictures += _part(findings, part, sorted(names, key=side_of_block))
    if spectra := _spectra(findings):
        pictures.append(spectra)
    pictures += _gates(findings)
    first, *rest = report_text(findings).splitlines()
    return page(first, rest[:-1], pictures)


def side_of_block(name: str) -> int:
    """Where a picture passes a layer: before everything else -1, on the way down 0, in the middle 1, up 2."""
    return next((i for i, words in enumerate(_SIDES) if any(word in name for word in words)), -1)


def place_of(name: str) -> tuple[str, str]:
    """(block, kind of layer) of a layer's name: a row and a column."""
    match = _PLACE.fullmatch(name)
    if match:
        # the only transformer of an attention block shares its row
        return match["block"].removesuffix(".transformer_blocks.0"), match["kind"]
    block, _, kind = name.rpartition(".")
    return block, kind


def table(values: Mapping[str, float | None]) -> tuple[list[list[float | None]], list[str], list[str]]:
    """Values by layer as blocks × kinds, with the labels of both; None where a block has no such layer."""
    rows = list(dict.fromkeys(place_of(name)[0] for name in values))
    columns = list(dict.fromkeys(place_of(name)[1] for name in values))
    cells: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    for name, value in values.items():
        block, kind = place_of(name)
        cells[rows.index(block)][columns.index(kind)] = value
    return cells, rows, columns


def _part(findings: Findings, part: str, names: list[str]) -> list[Image.Image]:
    legend = "share of W" if findings.is_relative else "norm"
    residual = [name for name in names if _RESIDUAL.search(name)]
    others = [name for name in names if name not in set(residual)]
    kinds: tuple[tuple[str, str, Callable[[str], float | None]], ...] = (
        (f"Size of the change in {part}", legend, findings.size),
        (f"Effective rank in {part}", "rank", lambda name: findings.spectra[name].effective_rank),
    )
    found = []
    for group, where in ((others, ": attention" if residual else ""), (residual, ": residual blocks")):
        for title, unit, value in kinds:
            values = {name: value(name) for name in group}
            if any(v is not None for v in values.values()):
                cells, rows, columns = table(values)
                short = [abbreviate(column) for column in columns]
                found.append(heatmap(cells, rows, short, title + where, "{:.2g}", legend=unit, low=0.0))
    return found


def _spectra(findings: Findings) -> Image.Image | None:
    """Singular values of a few layers from the flattest spectrum to the steepest."""
    known = {
        name: spectrum.singular_values
        for name, spectrum in findings.spectra.items()
        if spectrum.singular_values and spectrum.singular_values[0] > 0
    }
    if not known:
        return None
    order = sorted(known, key=lambda name: findings.spectra[name].effective_rank, reverse=True)
    count = min(_MAX_SPECTRA, len(order))
    picked = [order[round(i * (len(order) - 1) / max(count - 1, 1))] for i in range(count)]
    series = {}
    for name in dict.fromkeys(picked):
        values = [value / known[name][0] for value in known[name]]
        shown = [value if value > 1e-7 else None for value in values]  # what rounding leaves is no value
        series[abbreviate(name)] = (list(range(1, len(shown) + 1)), shown)
    title = "Spectrum of the change, from the flattest layer to the steepest"
    below, beside = "number of the singular value", "share of the largest"
    return line_plot(series, below, beside, title, log_y=True, height=440)


def _gates(findings: Findings) -> list[Image.Image]:
    if findings.record is None:
        return _trained_gates(findings)
    record, gates = findings.record, gate_summary(findings.record)
    shares = {
        name: [None if value is None else value / rank for value in row]
        for name, row, rank in zip(record["layers"], record["effective_rank"], record["ranks"], strict=True)
    }
    blocks: dict[str, list[list[float | None]]] = {}
    for name in sorted(shares, key=side_of_block):
        blocks.setdefault(place_of(name)[0], []).append(shares[name])
    means = [[_mean(column) for column in zip(*rows, strict=True)] for rows in blocks.values()]
    edges = [f"{i / record['bins']:.0%}" for i in range(record["bins"])]
    title = "Open gates in the last run, by block and noise level"
    places = [(i + 0.5) / record["bins"] for i in range(record["bins"])]
    levels = halvings(shares)
    curves = {"all layers": gates["by_noise"]}
    for level in sorted(set(levels.values())):
        rows = [shares[name] for name, found in levels.items() if found == level]
        curves[f"resolution 1/{2**level}"] = [_mean(column) for column in zip(*rows, strict=True)]
    if not levels:
        curves["most open layer"] = [_best(shares, i, max) for i in range(record["bins"])]
        curves["least open layer"] = [_best(shares, i, min) for i in range(record["bins"])]
    spread = {
        name: [None if value is None else value / rank for value in row]
        for name, row, rank in zip(record["layers"], record["input_spread"], record["ranks"], strict=True)
    }
    by_layer = sorted(shares, key=side_of_block)
    axis = "denoising, noisiest to cleanest"
    return [
        heatmap(means, list(blocks), edges, title, "{:.0%}", "open", axis, low=0.0, high=1.0),
        line_plot(
            {name: (places, values) for name, values in curves.items()},
            "denoising, 0 noisiest to 1 cleanest",
            "share of open gates",
            "Open gates over the denoising, by resolution" if levels else "Open gates over the denoising",
            height=400,
            y_range=(0.0, 1.0),
        ),
        *(
            heatmap(
                [values[name] for name in by_layer],
                [abbreviate(name) for name in by_layer],
                edges,
                title,
                "{:.0%}",
                legend,
                axis,
                low=0.0,
                high=high,
            )
            for values, title, legend, high in (
                (shares, "Open gates, by layer and noise level", "open", 1.0),
                (spread, "How much that differs from input to input at one noise level", "sd", 0.5),
            )
        ),
    ]


def _trained_gates(findings: Findings) -> list[Image.Image]:
    if not findings.trained_open:
        return []
    cells, rows, columns = table(findings.trained_open)
    short = [abbreviate(column) for column in columns]
    title = "Gates open on average in training (no run recorded yet)"
    return [heatmap(cells, rows, short, title, "{:.0%}", "open", low=0.0, high=1.0)]


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _best(
    shares: Mapping[str, list[float | None]], level: int, choose: Callable[[list[float]], float]
) -> float | None:
    known = [value for row in shares.values() if (value := row[level]) is not None]
    return choose(known) if known else None
