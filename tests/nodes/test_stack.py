"""Adapter Stack: what its text means, and what it refuses."""

from __future__ import annotations

import pytest

from tests.nodes.conftest import Pack


def rows(ours: Pack, text: str) -> list[tuple[object, ...]]:
    found = ours.module("nodes.stack").read_rows(text)
    return [(r.file, r.strength_model, r.strength_clip, r.schedule, r.is_on) for r in found]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0, 1.0, "", True)),
        ("a | 0.5", ("a", 0.5, 0.5, "", True)),
        ("# sub/a b | -2 | 0 | 0:1, 1:0", ("sub/a b", -2.0, 0.0, "0:1, 1:0", False)),
        ("lora:c||.25|bell", ("lora:c", 1.0, 0.25, "bell", True)),
    ],
)
def test_a_line(ours: Pack, line: str, expected: tuple[object, ...]) -> None:
    assert rows(ours, f"\n{line}\n  \n") == [expected]


@pytest.mark.parametrize("line", ["| 1", "a | x", "a | 1 | 1 | bell | 5", "a | nan", "a | 1e9", "#"])
def test_a_line_that_cannot_be_read_is_quoted(ours: Pack, line: str) -> None:
    with pytest.raises(ours.error, match="line 2") as raised:
        rows(ours, f"good\n{line}")
    assert repr(line) in str(raised.value)
