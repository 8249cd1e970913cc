"""The comparison on a sentence encoder at its smallest: a random BERT, sentences made here, two steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.claims import pretrained, pretrained_report
from benchmarks.claims.figures import Figures, Mean
from benchmarks.claims.lab import Lab
from benchmarks.claims.sentence_methods import METHODS, REFERENCE
from benchmarks.claims.sentences import Texts, sense, sentiment, topic
from spectral_core.errors import SpectralAdapterError

WORDS = 50


class Words:
    """A tokenizer of numbers."""

    def __call__(self, first: str, second: str = "") -> dict[str, list[int]]:
        ids = [1 + int(word) for word in first.split()]
        return {"input_ids": ids, "token_type_ids": [0] * len(ids)}


def sentences(_: Path) -> Texts:
    """Even numbers against odd ones, in sentences of three to six."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, WORDS // 2, (80, 6), generator=generator).tolist()
    examples = [
        (" ".join(str(2 * n + i % 2) for n in row[: 3 + i % 4]), "", i % 2) for i, row in enumerate(drawn)
    ]
    return Texts(tuple(examples), 2)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pretrained.Bench:
    from transformers import BertConfig, BertModel

    sizes = {"STEPS": 3, "BATCH": 4, "TESTED": 16, "SWEPT_ON": 8, "PROBED_ON": 16}
    for name, value in sizes.items():
        monkeypatch.setattr(pretrained, name, value)
    monkeypatch.setattr(pretrained, "TASKS", {"parity": sentences})
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS + 2,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
    )
    model = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False).bfloat16()
    lab = Lab(tmp_path, replace(pretrained.SETTING, seeds=(0, 1, 2)))
    return pretrained.Bench(lab, model, Words(), tmp_path, 1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_begins_as_the_model_and_learns(bench: pretrained.Bench, name: str) -> None:
    """At a rate of zero only the head moves: the same loss, whatever the method."""
    pytest.importorskip("peft")
    before = {n: p.clone() for n, p in bench.model.state_dict().items()}
    still = bench.trained("parity", METHODS[name], 1e-12, 0)
    moved = bench.trained("parity", METHODS[name], 3e-2, 0)
    reference = bench.trained("parity", METHODS["svdiff"], 1e-12, 0)
    assert still["loss"] == pytest.approx(reference["loss"], abs=5e-3), "bf16 rounds the adapters apart"
    assert moved["loss"] != still["loss"] and still["parameters"] > 0
    assert all(torch.equal(p, before[n]) for n, p in bench.model.state_dict().items())
    assert ("open" in moved) == (name == "foura_gate")


def test_a_sweep_ends_inside_its_grid_and_between_its_steps(
    bench: pretrained.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is least a third of a step above 10^1.5 times the first guess."""

    def loss(_: Any, task: str, method: Any, rate: float, seed: int, sweep: bool) -> dict[str, Any]:
        return {"loss": (2 * math.log10(rate / method.start) - 3.3) ** 2}

    monkeypatch.setattr(pretrained.Bench, "trained", loss)
    assert bench.rate("parity", "lora") == pytest.approx(3e-3 * 10**1.65, rel=0.05)
    assert pretrained.vertex({0: 1.0, 1: 0.5}, 1) == 1.0, "an end has no vertex"


def test_adapters_and_head_see_other_sentences_than_the_test(bench: pretrained.Bench) -> None:
    task = bench.task("parity")
    adapters, head = task.training(3)
    groups = [set(adapters), set(head), set(task.test), set(task.validation)]
    assert sum(map(len, groups)) == len(set().union(*groups)) and len(adapters) == 12
    assert task.training(3) == task.training(3) != task.training(4)


def test_differences_are_paired_and_say_what_could_have_been_seen() -> None:
    def cell(loss: float) -> dict[str, float]:
        return {"loss": loss, "head_loss": 1.0, "accuracy": 1 - loss, "head_accuracy": 0.5, "rate": 1.0}

    cells: dict[str, Any] = {}
    for seed, level in enumerate((0.2, 0.4, 0.6)):
        cells[f"test__topic__3__lora__{seed}"] = cell(level) | {"parameters": 5}
        cells[f"test__topic__3__top__{seed}"] = cell(level - 0.1 - 0.01 * seed) | {"parameters": 5}

    class Kept:
        setting = replace(pretrained.SETTING, seeds=(0, 1, 2))

        def known(self, name: str) -> Mapping[str, Any] | None:
            return cells.get(name)

    figures = Figures(Kept())  # type: ignore[arg-type]
    gap = pretrained_report.difference(figures, "top", "lora", pretrained_report._less, ("topic",))
    assert gap.values == pytest.approx((10, 11, 12)) and gap.visible == pytest.approx(2 / 3**0.5)
    ((label, tasks, loss, right),) = [r for r in pretrained_report.verdicts(figures) if "LoRA" in r[0]][:1]
    assert (label, tasks) == ("top columns above LoRA", "topic")
    assert loss.endswith("(visible 1.2): shows") and right.endswith(": shows")
    assert set(REFERENCE.values()) <= set(METHODS)
    assert Mean((1.0, -1.0, 0.5)).verdict(0.1) == "not decidable here"
    assert Mean((1.0, -1.0, 0.5)).verdict(5.0) == "does not show"


def test_texts_become_tasks(tmp_path: Path) -> None:
    (tmp_path / "movieReviewSnippets_GroundTruth.txt").write_text(
        "1\t2.0\tA fine film\n2\t-1.5\tDull\n3\t0.1\tA film\n", encoding="utf-8"
    )
    assert set(sentiment(tmp_path).examples) == {("A fine film", "", 1), ("Dull", "", 0)}
    sections = ["games", "science", "net", "admin", "sound", "graphics", "x11", "text", "math", "web"]
    blocks = [f"Package: p{s}\nSection: {s}\nDescription: about {s}\n more" for s in sections]
    again = "Package: other\nSource: pgames\nSection: games\nDescription: again\n"
    (tmp_path / "debian.txt").write_text("\n\n".join([*blocks, again]), encoding="utf-8")
    found = topic(tmp_path)
    assert found.classes == 10 and len(found.examples) == 10, "one package of a source"
    for kind in ("noun", "verb", "adj"):
        (tmp_path / f"data.{kind}").write_text("", encoding="utf-8")
        (tmp_path / f"index.{kind}").write_text("", encoding="utf-8")
    (tmp_path / "data.noun").write_text(
        '11 03 n 01 bank 0 000 | sloping land; "they pulled it up on the bank"\n'
        "22 03 n 01 bank 0 000 | a financial institution\n",
        encoding="utf-8",
    )
    (tmp_path / "index.noun").write_text("bank n 2 1 @ 2 1 11 22  \n", encoding="utf-8")
    example = "they pulled it up on the bank"
    assert sense(tmp_path).examples == (
        ("bank: sloping land", example, 1),
        ("bank: a financial institution", example, 0),
    )
    with pytest.raises(SpectralAdapterError, match=r"debian\.txt: no such file"):
        topic(tmp_path / "nowhere")
