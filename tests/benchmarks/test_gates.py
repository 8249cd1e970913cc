"""The gates' benchmark: its statistics, and why a transform matters to Adam and to Muon not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.claims.figures import Mean
from benchmarks.quality import gates_page
from benchmarks.quality.gates import Seen
from benchmarks.quality.gates_cells import GROUPS
from benchmarks.quality.gates_page import paired
from benchmarks.quality.muon import in_place_of_adamw
from spectral_core.maths.transforms import fold
from spectral_core.methods import FouRAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine import optim
from spectral_core.training.engine.loop import train
from tests.core.training.training_toy import Toy


def test_a_paired_difference_says_what_could_have_been_seen() -> None:
    assert paired(Mean((0.5, 0.0, 0.5))) == "+0.333, t 2.0, visible 0.333"
    assert paired(Mean((0.5, 0.4))) == "+0.450" and paired(Mean(())) == "–"


def test_the_page_compares_at_the_seeds_that_both_have(tmp_path: Path) -> None:
    gate, _, lora = GROUPS["batch 8"]
    there = {"open": 0.5, "switching": 0.4, "noisy": 0.1, "levels": [0.6, 0.4], "frozen": 3.0}
    cells: dict[str, Any] = {gate.key(s): {"held_out": float(s), **there} for s in (0, 1)}
    cells |= {lora.key(1): {"held_out": 5.0}, lora.key(0): {"held_out": None}}
    made = gates_page.Tables(cells, [0, 1, 2])
    assert made.losses().splitlines()[-1].endswith("| 2 | 0.500 ± 0.707 | 3.000 ± 0.000 | – | – | 5.000 |")
    assert made.differences().splitlines()[-1].endswith("| -2.500 | – | – | -4.000 |")
    assert "| 0.60, 0.40 | +0.200 |" in made.decisions()
    page = gates_page.write(cells, [0, 1, 2], tmp_path / "page.md")
    assert "rank 8, 300 steps of 8, 0.003" in page.read_text(encoding="utf-8")


def test_the_best_rate_is_each_ones_own() -> None:
    losses = {"dct adaptive": (3.0, 1.0), "dct none": (2.0, 4.0), "lora": (1.5, 5.0)}
    by_rate = {1e-3: 0, 3e-3: 1}
    swept = [cell for cell in GROUPS["main"] if cell.rate in by_rate and cell.adapter in losses]
    cells = {c.key(0): {"held_out": losses[c.adapter][by_rate[c.rate]]} for c in swept}
    lines = gates_page.Tables(cells, [0]).best().splitlines()
    assert [line.split(" | ")[-2] for line in lines[2:]] == ["0.003", "0.001", "0.001"]
    assert lines[3].endswith("| -1.000 |") and lines[4].endswith("| -0.500 |")


def test_what_is_open_by_resolution_and_noise() -> None:
    seen = Seen()
    for layer, is_open in (
        ("unet.down_blocks.0.x", [[1, 1], [1, 0]]),
        ("unet.down_blocks.1.x", [[0, 0], [0, 0]]),
    ):
        seen.record(layer, torch.tensor(is_open), torch.tensor([0.1, 0.9]))
    assert seen.summary() == {
        "open": 3 / 4 / 2 * 1.0,
        "switching": 0.25,
        "noisy": 0.25,
        "levels": [0.75, 0.0],
    }


def test_every_cell_has_its_own_key() -> None:
    for group, cells in GROUPS.items():
        assert len({cell.key(0) for cell in cells}) == len(cells), group


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
@pytest.mark.parametrize(("name", "most"), [("muon", 0.02), ("sgd", 1e-4), ("adamw", None)])
def test_from_the_same_start_a_transform_matters_to_adam_alone(name: str, most: float | None) -> None:
    changes = []
    for transform in ("none", "dct"):
        made = Toy(FouRAConfig(4, transform=transform, gate="none"), batch=6)  # type: ignore[arg-type]
        plain = Toy(FouRAConfig(4, transform="none", gate="none"), batch=6)
        starts = dict(plain.attachment.named_parameters())
        for path, parameter in made.attachment.named_parameters():
            if path.endswith(".a"):
                start = starts[path].data
                back = fold(torch.eye(start.shape[1]), transform, 1).mT  # orthonormal
                parameter.data.copy_(start @ back)
        rate = {"muon": 3e-2, "sgd": 0.5, "adamw": 1e-2}[name]
        options = TrainConfig(
            steps=60, learning_rate=rate, weight_decay=0.0, optimiser="sgd" if name == "sgd" else "adamw"
        )
        if name == "muon":
            kept = optim.BUILDERS["adamw"]
            with in_place_of_adamw():
                train(made.setup, options, "foura")
            assert optim.BUILDERS["adamw"] is kept
        else:
            train(made.setup, options, "foura")
        layers = made.attachment.to_adapter().layers.values()
        folded = [layer.terms[0].factors(layer.shape) for layer in layers]
        changes.append(torch.cat([(f.up @ f.down).flatten() for f in folded]))
    apart = float((changes[0] - changes[1]).norm() / changes[0].norm())
    assert changes[0].norm() > 0.1
    assert apart < most if most is not None else apart > 0.05, apart
