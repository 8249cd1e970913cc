"""What a file says of freezing its gates."""

from __future__ import annotations

from typing import Any

import pytest

from spectral_core.adapter.adapter import Provenance


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"gates_loss": 0.25, "gates_loss_frozen": 0.275}, "loss 0.2500, frozen 0.2750 (+10.0%)"),
        ({"gates_loss": 0.25}, ""),
        ({"gates_loss": 0.0, "gates_loss_frozen": 0.1}, ""),
        ({"gates_loss": "much", "gates_loss_frozen": 0.1}, ""),
        ({"gates_loss": float("nan"), "gates_loss_frozen": 0.1}, ""),
        ({}, ""),
    ],
)
def test_what_freezing_costs(training: dict[str, Any], words: str) -> None:
    found = Provenance(training=training).frozen_gates
    assert found.endswith(words) and bool(found) == bool(words)
