"""The evidence at its smallest: cells are made once and shared, and the page says what they say."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("diffusers")

from benchmarks.claims import __main__ as command
from benchmarks.claims import capacity, claims_foura, claims_spectral, fusing, learning, report, styles
from benchmarks.claims.figures import OPEN, OPPOSITE, SHOWS, Figures, Mean, interpolated
from benchmarks.claims.lab import PROTOCOL, SMALL, Busy, Lab, Task
from benchmarks.claims.measure import CharacterMeter, StyleMeter, diversity


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
        capacity.cost_cells(lab),
        capacity.column_cells(lab)[:3],
        capacity.budget_cells(lab)[:1],
        [cell for cell in fusing.cells(lab) if "own_columns__0" in cell[0]],
        learning.cells(lab)[:2],
    )
    command.work(lab, [cell for group in groups for cell in group])
    return folder


def test_every_experiment_gives_numbers(folder: Path) -> None:
    cells = {p.stem: json.loads(p.read_text()) for p in (Lab(folder, SMALL).folder / "cells").glob("*.json")}
    assert {"style__base", "merging__lora__0", "gates__8__0", "exact"} <= set(cells)
    style = next(cell for name, cell in cells.items() if name.startswith("style__foura"))
    assert style["strength 1"]["both"] <= style["strength 1"]["inked"] and "strength 1 frozen" in style
    fused = cells["fusing__spectral_a_own_columns__0"]
    assert set(fused["closed-form"]["concepts"]) == set(fusing.NAMES)
    assert all(0 <= v["fidelity"] <= 1 for v in fused["alone"]["concepts"].values())
    assert all(
        {"drift", "leak"} <= set(how) for how in fused.values() if isinstance(how, dict) and "concepts" in how
    )
    assert 0 <= fused["closed-form"]["together"] <= 1 and fused[fusing.TUNED]["weight"] > 0
    learned = cells["learning__character__lora__0"]
    assert (
        set(learned) >= {"0", "1", "3", "rate"} and learned["3"]["similarity"] != learned["0"]["similarity"]
    )
    assert cells["exact"]["rank_capacity"] == {"lora": [8, 8], "spectral_a": [16, 16]}
    assert cells["exact"]["rotation"]["largest_change"] < 1e-5
    assert cells["cost"]["base"] == 859_520_964 and cells["cost"]["gates"]["8"] > 128 * 8
    assert all(cell["protocol"] == PROTOCOL for cell in cells.values())


def test_a_cell_is_made_once_and_not_by_two_at_once(folder: Path) -> None:
    lab = Lab(folder, SMALL)
    assert lab.cell("exact", lambda: pytest.fail("made again"))["rank_capacity"]
    with lab.alone("new"), pytest.raises(Busy):
        Lab(folder, SMALL).cell("new", dict)
    assert lab.known("new") is None


def test_published_numbers_are_made_anew_when_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "claims_small.json").write_text('{"one": {"value": 1}}', encoding="utf-8")
    monkeypatch.setattr("benchmarks.claims.lab.RESULTS", tmp_path)
    kept, again = (Lab(tmp_path, SMALL, again=flag) for flag in (False, True))
    assert kept.cell("one", lambda: pytest.fail("made again"))["value"] == 1
    assert Figures(kept).outdated("one") and again.cell("one", lambda: {"value": 2})["value"] == 2
    assert not Figures(kept).outdated("one")


def test_page_keeps_the_words_around_the_numbers(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    report.write(Lab(folder, SMALL), tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before") and text.endswith("after\n") and "\nold\n" not in text
    assert "'lora': [8, 8], 'spectral_a': [16, 16]" in text and "older settings" not in text
    pages = {p.stem: p.read_text(encoding="utf-8") for p in (tmp_path / "evidence").glob("*.md")}
    assert set(pages) == set(report.PAGES)
    rows = [line for line in text.splitlines() if "](evidence/" in line]
    assert len(rows) == len(report.CLAIMS)
    for row in rows:
        number, link = row.split(" | ")[0].removeprefix("| [").split("](evidence/")
        page, heading = link.rstrip(")").split(".md#")
        title = next(line for line in pages[page].splitlines() if line.startswith(f"### {number}."))
        kept = "".join(c for c in title[4:].lower() if c.isalnum() or c in " -_")
        assert kept.replace(" ", "-") == heading, "links lead to their sections"
    pictures = [p.name for p in (tmp_path / "evidence").iterdir() if p.suffix != ".md"]
    assert pictures and all(any(f"]({name})" in said for said in pages.values()) for name in pictures)


def test_verdicts() -> None:
    assert Mean((0.10, 0.12, 0.11)).verdict() == SHOWS
    assert Mean((-0.10, -0.12, -0.11)).verdict() == OPPOSITE
    assert Mean((0.1, -0.12, 0.03)).verdict() == OPEN
    assert interpolated([(0.0, 1.0), (1.0, 3.0)], 0.25) == 1.5
    assert interpolated([(0.0, 1.0), (1.0, 3.0)], 2) is None


class Kept:
    """A lab that has these cells."""

    def __init__(self, cells: Mapping[str, Any]) -> None:
        self.cells, self.setting = cells, replace(SMALL, seeds=(0, 1, 2), strengths=(0.6, 1.0, 1.3))

    def known(self, name: str) -> Any:
        return self.cells.get(name)


def test_adapters_are_compared_where_their_styles_are_equal() -> None:
    """FouRA has LoRA's style of 0.6 half-way between two strengths, and LoRA's value there is its own."""

    def cell(*points: tuple[float, float]) -> dict[str, Any]:
        reads = [{styles.STYLE: x, "diversity": y, "right": 1.0} for x, y in points]
        return dict(zip(("strength 0.6", "strength 1", "strength 1.3"), reads, strict=True))

    lab = Kept(
        {
            "style__base": {styles.STYLE: 0.0, "diversity": 0.9, "right": 1.0},
            "style__lora__0": cell((0.3, 0.5), (0.6, 0.4), (0.9, 0.3)),
            "style__foura_dct_adaptive__0": cell((0.4, 0.7), (0.8, 0.5), (0.9, 0.2)),
            "style__lora__1": cell((0.3, 0.5), (0.95, 0.4), (0.96, 0.3)),
            "style__foura_dct_adaptive__1": cell((0.4, 0.7), (0.8, 0.5), (0.9, 0.2)),
            "style__foura_dct_adaptive__2": cell((0.4, 0.7), (0.8, 0.5), (0.9, 0.2)),
        }
    )
    matched = claims_foura._matched(Figures(lab), claims_foura.FOURA, "diversity")
    assert matched == pytest.approx({0: 0.6}), "no value where it never gets there, none without a LoRA"
    own = claims_foura._matched(Figures(lab), claims_foura.LORA, "diversity")
    assert own == pytest.approx({0: 0.4, 1: 0.4})
    found = claims_foura.diversity(Figures(lab))
    gain, *at = found["parts"]
    assert gain.verdict == "too few seeds (1)" and gain.value == "0.200" and gain.visible == "–"
    said = [(part.value, part.verdict) for part in at if "DCT" in part.what]
    assert said == [("0.200 ± 0.000", "too few seeds (2)"), ("0.100 ± 0.000", "too few seeds (2)")]


def test_two_ranks_of_a_seed_are_one_seed() -> None:
    found = {
        "layers": ["unet.down_blocks.0.a", "unet.mid_block.a"],
        "ranks": [8, 8],
        "effective_rank": [[8.0, 4.0], [4.0, 4.0]],
    }
    bins = [[line[0]] * (styles.STEP_BINS - 1) + [line[1]] for line in found["effective_rank"]]
    cell = {"gates": {**found, "effective_rank": bins}}
    lab = Kept({f"gates__{rank}__{seed}": cell for rank in (8, styles.SPARE_RANK) for seed in (0, 1)})
    claim = claims_foura.gates(Figures(lab))
    assert [p.verdict for p in claim["parts"]] == ["too few seeds (2)"] * 2


def test_fusions_that_ran_on_fewer_seeds_have_fewer() -> None:
    def cell(*fusions: str) -> dict[str, Any]:
        read = {"fidelity": 0.5, "crosstalk": 0.1, "background": 1.0, "similarity": 0.2}
        return {how: {"concepts": dict.fromkeys(fusing.NAMES, read), "drift": 0.1} for how in fusions}

    usual = [how for how in fusing.FAMILIES["lora"][1] if how != "gradient"]
    cells = {f"fusing__lora__{seed}": cell("alone", *usual) for seed in (0, 1, 2)}
    cells["fusing__lora__0"] = cell("alone", *fusing.FAMILIES["lora"][1])
    lab = Kept(cells)
    lab.strip = lambda name: []
    claim = claims_spectral.fusion(Figures(lab))
    rows = {line.split(" | ")[1]: line for line in claim["table"].splitlines() if line.startswith("| lora |")}
    assert "0.50 ± 0.00" in rows["closed-form"] and "| 0.50 |" in rows["gradient"]
    kept = next(p for p in claim["parts"] if p.what == "closed-form keeps 90% of each (lora)")
    assert (kept.value, kept.verdict) == ("bot 1.00, fish 1.00, imp 1.00", "holds")


def test_a_best_strength_at_the_end_of_its_grid_decides_nothing() -> None:
    """Both styles of LoRA show most at 1, of FouRA still more at 1.3."""
    read = {"inked": 0.1, "poster": 0.1, "right": 0.5, "diversity": 0.2}

    def cell(*both: float) -> dict[str, Any]:
        return {f"strength {s}": {"both": b, **read} for s, b in zip((0.6, 1, 1.3), both, strict=True)}

    cells = {f"merging__lora__{seed}": cell(0.1, 0.4, 0.2) for seed in (0, 1, 2)}
    rising = {f"merging__foura_dct_adaptive__{seed}": cell(0.1, 0.2, 0.3) for seed in (0, 1, 2)}
    (open_ended,) = claims_foura.merging(Figures(Kept(cells | rising)))["parts"]
    assert open_ended.verdict.endswith("(3 of 6)") and open_ended.verdict.startswith("not decidable here")
    falling = {name: cell(0.1, 0.3 + 0.01 * int(name[-1]), 0.2) for name in rising}
    (decided,) = claims_foura.merging(Figures(Kept(cells | falling)))["parts"]
    assert decided.verdict == OPPOSITE and decided.value.startswith("-0.09")
    assert styles._past_best([0.1, 0.4, 0.3, 0.2]) and not styles._past_best([0.1, 0.4, 0.3])


def test_frozen_gates_are_compared_by_what_they_add(tmp_path: Path) -> None:
    rows = [
        {"rank": 64, "pass": "forward", "size": size, "name": name, "ratio": ratio}
        for size, values in ((320, (1.1, 1.2)), (640, (1.1, 1.4)))
        for name, ratio in zip(("foura dct frozen", "foura dct adaptive"), values, strict=True)
    ]
    (tmp_path / "layers.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    (part,) = claims_spectral.frozen_saves(tmp_path / "layers.json")
    assert part.value == "25% to 50%" and part.verdict == SHOWS


def test_few_parameters_need_most_of_the_gain_on_enough_seeds() -> None:
    low, high = Mean((0.1, 0.1, 0.1)), Mean((0.2, 0.2, 0.2))
    assert claims_spectral._budget_verdict(Mean((0.17, 0.17, 0.17)), high).startswith("shows")
    assert claims_spectral._budget_verdict(low, high) == "does not show (50% of rank 1's gain)"
    assert claims_spectral._budget_verdict(Mean((0.2, 0.2)), high) == "too few seeds (2)"


def test_a_copy_is_what_lies_nearer_than_unseen_drawings_do() -> None:
    """Training pictures lie on one axis, unseen drawings from 0.2 rad to 1.2 away from it."""
    import torch

    def at(angles: Any) -> Any:
        return torch.stack([torch.cos(angles), torch.sin(angles)], 1)

    class Judge:
        def features(self, pictures: Any) -> Any:
            if len(pictures) == 200:
                return at(torch.linspace(0.2, 1.2, 200))
            return at(torch.zeros(len(pictures))) if len(pictures) == 5 else at(torch.tensor(pictures))

    meter = StyleMeter(SimpleNamespace(judge=Judge(), setting=SMALL), "poster")
    assert meter.copied([0.0, 0.1, 0.24, 0.3, 0.5, 1.0, 1.1, 1.2], seed=0, count=5) == pytest.approx(3 / 8)


def test_diversity_is_the_mean_distance_within_a_prompt() -> None:
    import torch

    same, apart = torch.eye(4)[[0, 0]], torch.eye(4)[[1, 2]]
    assert diversity(torch.cat([same, apart]), 2) == pytest.approx(0.5)


def test_photographs_need_a_picture_for_every_caption(tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"no caption \(\*\.txt\)"):
        learning.photo_folder(str(tmp_path))
    (tmp_path / "a.txt").write_text("<TOK>, on a sofa", encoding="utf-8")
    with pytest.raises(argparse.ArgumentTypeError, match=r"a\.txt has no picture"):
        learning.photo_folder(str(tmp_path))
    Image.new("RGB", (80, 80), "red").save(tmp_path / "a.png")
    ((picture, caption),) = Task("photos", "dog", learning.photo_folder(str(tmp_path))).pictures(7, 5)
    assert picture.size == (128, 128) and caption == "<dog>, on a sofa"


def test_characters_are_judged_under_wordings_that_no_fusion_was_fitted_to() -> None:
    setting = replace(SMALL, pictures=30)
    meter = CharacterMeter(SimpleNamespace(setting=setting), ("bot", "fish"))
    judged = meter.prompts("bot")
    assert not {prompt for prompt, _ in judged} & set(fusing._prompts("bot"))
    assert len(judged) == 12 and all(background in prompt for prompt, background in judged)
    assert len({prompt for prompt, _ in judged}) == 12, "every wording with every background"


def test_the_weight_of_a_sum_grows_until_the_best_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certainty is greatest where all three adapters have a weight of 1.5 / 3."""
    monkeypatch.setattr(fusing, "fuse", lambda adapters, method, weights: SimpleNamespace(adapter=weights[0]))
    best = SimpleNamespace(names=("a",), certainty=lambda name, adapters: -abs(adapters[0] - 0.2))
    assert fusing._best_weight(best, [None] * 3) == pytest.approx(3**-0.5 / 3)
    most = SimpleNamespace(names=("a",), certainty=lambda name, adapters: adapters[0])
    assert fusing._best_weight(most, [None] * 3) == pytest.approx(9), "and ends after seven"
