"""The table of settings: every row is checked, offered by the commands and in the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from spectral_core.errors import SpectralAdapterError
from spectral_core.methods import METHODS
from spectral_core.pipelines.job import Job
from spectral_core.training.config import reading
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.config.setting import check_settings, setting, settings_of
from spectral_core.training.engine.named_run import Output
from tools import settings_table

CLASSES = (TrainConfig, Job, Output)


@dataclass(frozen=True)
class Toy:
    whole: int = setting(3, "A number. More of it.", "one", least=1)
    share: float = setting(0.5, "A share.", "one", least=0, most=1, ends="(]")
    limit: float | None = setting(None, "A limit.", "two", least=0, most=1, ends="[)")
    word: Literal["left", "right"] = setting("left", "A side.", "two")
    pair: tuple[float, float] = setting((0.0, 1.0), "Two.", "two", least=0)
    names: tuple[str, ...] = setting((), "Some.", "two")
    on: bool = setting(False, "A switch.", "two")
    plain: int = 0  # no setting

    def __post_init__(self) -> None:
        check_settings(self)


def test_rows_hold_what_the_fields_say() -> None:
    rows = settings_of(Toy)
    assert list(rows) == ["whole", "share", "limit", "word", "pair", "names", "on"]
    assert [rows[n].kind for n in rows] == [int, float, float, str, tuple, tuple, bool]
    assert rows["word"].choices == ("left", "right") and rows["limit"].optional
    assert (rows["pair"].item, rows["pair"].length) == (float, 2) and rows["names"].length == 0
    assert rows["whole"].short_help == "A number" and rows["share"].range == "0 < x ≤ 1"
    assert Toy(pair=[1, 2]).pair == (1, 2), "lists become tuples"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"whole": 0}, "whole 0: expected a whole number of at least 1"),
        ({"whole": 1.5}, "expected a whole number"), ({"whole": True}, "expected a whole number"),
        ({"share": 0}, "0 < x ≤ 1"), ({"share": 1.1}, "0 < x ≤ 1"), ({"share": float("nan")}, "a number"),
        ({"share": "1"}, "a number"), ({"share": None}, "a number"),
        ({"limit": 1.0}, "0 ≤ x < 1, or nothing"),
        ({"word": "rigth"}, "did you mean 'right'"), ({"word": "zzz"}, "word 'zzz': expected one of left"),
        ({"word": None}, "expected one of left"), ({"word": ["left"]}, "expected one of left"),
        ({"pair": (1.0,)}, "2 numbers"), ({"pair": (1.0, -1.0)}, "at least 0"), ({"pair": "ab"}, "2 numbers"),
        ({"names": "x"}, "several"), ({"on": 1}, "true or false"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SpectralAdapterError, match=said) as caught:
        Toy(**wrong)
    assert str(caught.value).startswith(next(iter(wrong)))


def test_ends_that_belong_to_the_range() -> None:
    assert Toy(share=1, limit=0.0, whole=1).share == 1


def test_every_default_is_a_value_and_has_words_that_fit() -> None:
    for name, row in settings_of(*CLASSES).items():
        row.check(row.default)
        assert len(row.short_help) < 90 and row.words.help.endswith("."), name
        assert row.short_help[0].isupper(), name


def test_the_methods_that_read_a_setting_are_those_whose_configuration_has_it() -> None:
    rows = settings_of(*CLASSES)
    assert set(rows["method"].choices) < set(METHODS), "and orthogonal, which no command offers"
    told = {name: rows[name].words.methods for name in ("columns", "alpha", "transform", "rank")}
    spectral = ("spectral_a", "spectral_r")
    assert told == {"columns": spectral, "alpha": ("foura", "lora"), "transform": ("foura",), "rank": ()}


def test_values_from_text() -> None:
    read = {name: reading.reader_of(row) for name, row in settings_of(*CLASSES).items()}
    assert read["steps"]("7") == 7 and read["learning_rate"]("1e-3") == 1e-3
    assert read["columns"]("0-2, 7") == (0, 1, 2, 7) and read["columns"]("") == ()
    assert read["size"]("768x512") == (768, 512) and read["betas"]("0.9,0.5") == (0.9, 0.5)
    assert read["sample_prompts"]("a cat") == "a cat"
    for wrong in ("3-1", "a", "0-99999999"):
        with pytest.raises(SpectralAdapterError, match="columns"):
            read["columns"](wrong)


def test_the_table_in_the_documentation_is_current() -> None:
    text = settings_table.TARGET.read_text(encoding="utf-8")
    assert settings_table.written(text) == text, "run: python -m tools.settings_table"
