"""The evidence at its smallest: cells are made once and shared, and the page says what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from benchmarks.claims import __main__ as command
from benchmarks.claims import capacity, fusing, report, styles
from benchmarks.claims.figures import OPEN, OPPOSITE, SHOWS, Mean, interpolated
from benchmarks.claims.lab import SMALL, Busy, Lab
from benchmarks.claims.measure import diversity


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one cell of every experiment was run in the reduced setting."""
    folder = tmp_path_factory.mktemp("claims")
    lab = Lab(folder, SMALL)
    groups = (
        styles.style_cells(lab)[:3],
        styles.merging_cells(lab)[:1],
        styles.copying_cells(lab)[1:2],
        styles.gate_cells(lab)[:1],
        capacity.exact_cells(lab),
        capacity.column_cells(lab)[:3],
        capacity.budget_cells(lab)[:1],
        [cell for cell in fusing.cells(lab) if "own_columns__0" in cell[0]],
    )
    command.work(lab, [cell for group in groups for cell in group])
    return folder


def test_every_experiment_gives_numbers(folder: Path) -> None:
    cells = {p.stem: json.loads(p.read_text()) for p in (folder / "small" / "cells").glob("*.json")}
    assert {"style__base", "merging__lora__0", "gates__8__0", "exact"} <= set(cells)
    style = next(cell for name, cell in cells.items() if name.startswith("style__foura"))
    assert style["strength 1"]["both"] <= style["strength 1"]["inked"] and "strength 1 frozen" in style
    fused = cells["fusing__spectral_a_own_columns__0"]
    assert set(fused["closed-form"]["concepts"]) == set(fusing.NAMES)
    assert all(0 <= v["fidelity"] <= 1 for v in fused["alone"]["concepts"].values())
    assert cells["exact"]["rank_capacity"] == {"lora": [8, 8], "spectral_a": [16, 16]}
    assert cells["exact"]["rotation"]["largest_change"] < 1e-5


def test_a_cell_is_made_once_and_not_by_two_at_once(folder: Path) -> None:
    lab = Lab(folder, SMALL)
    assert lab.cell("exact", lambda: pytest.fail("made again"))["rank_capacity"]
    with lab.alone("new"), pytest.raises(Busy):
        Lab(folder, SMALL).cell("new", dict)
    assert lab.known("new") is None


def test_page_keeps_the_words_around_the_numbers(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    report.write(Lab(folder, SMALL), tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before") and text.endswith("after\n") and "\nold\n" not in text
    assert "'lora': [8, 8], 'spectral_a': [16, 16]" in text
    assert all(f"](evidence/{p.name})" in text for p in (tmp_path / "evidence").iterdir())


def test_verdicts() -> None:
    assert Mean((0.10, 0.12, 0.11)).verdict() == SHOWS
    assert Mean((-0.10, -0.12, -0.11)).verdict() == OPPOSITE
    assert Mean((0.1, -0.12, 0.03)).verdict() == OPEN
    assert interpolated([(0.0, 1.0), (1.0, 3.0)], 0.25) == 1.5
    assert interpolated([(0.0, 1.0), (1.0, 3.0)], 2) is None


def test_diversity_is_the_mean_distance_within_a_prompt() -> None:
    import torch

    same, apart = torch.eye(4)[[0, 0]], torch.eye(4)[[1, 2]]
    assert diversity(torch.cat([same, apart]), 2) == pytest.approx(0.5)
