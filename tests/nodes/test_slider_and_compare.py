"""Concept Slider and Compare Adapters, as far as no host is needed: what they make of their widgets."""

from __future__ import annotations

import pytest

from tests.nodes.conftest import Pack

WORDS = {
    "positive": "a large {}",
    "negative": "a small {}",
    "neutral": "a {}",
    "preserve": ("star",),
    "method": "foura",
    "rank": 4,
    "run_name": "size",
}


def test_a_slider_takes_what_it_reads_of_the_options(ours: Pack) -> None:
    slider = ours.module("nodes.slider")
    options = {
        "learning_rate": 1e-3,
        "targets": "all",
        "precision": "bf16",
        "resolution": 512,
        "buckets": False,
    }
    job, notes = slider.job_of(WORDS, 60, options)
    assert (job.config.steps, job.config.learning_rate, job.config.batch_size) == (60, 1e-3, 2)
    assert (job.targets, job.precision, job.preserve) == ("all", "bf16", ("star",))
    assert notes == ["resolution: not read by a slider, which has no pictures"]
    assert set(job.texts) == {"a star", "a large star", "a small star"}
    assert "run_name" not in job.settings() and "config" not in job.settings()


@pytest.mark.parametrize(
    "wrong", [{"negative": "a large {}"}, {"positive": " "}, {"run_name": "../x"}, {"eta": 0.0}]
)
def test_a_slider_that_cannot_be_is_refused(ours: Pack, wrong: dict[str, object]) -> None:
    with pytest.raises(ours.error):
        ours.module("nodes.slider").job_of({**WORDS, **wrong}, 60, {})


def test_columns_are_named_with_their_strength_where_there_are_several(ours: Pack) -> None:
    compare = ours.module("nodes.compare")
    columns = compare._alone([ours.adapter(seed=1), ours.adapter(seed=2)])
    assert [label for label, _ in columns] == ["cat (1)", "cat (2)"]
    found = compare._at_strengths(columns, compare._strengths("0.5; -1,"))
    assert [label for label, _ in found] == ["cat (1), 0.5", "cat (1), -1", "cat (2), 0.5", "cat (2), -1"]
    assert [adapter.strength for _, (adapter,) in found] == [0.5, -1, 0.5, -1]
    assert [label for label, _ in compare._at_strengths(columns, [2.0])] == ["cat (1)", "cat (2)"]
    with pytest.raises(ours.error, match="expected numbers with commas"):
        compare._strengths("half")
