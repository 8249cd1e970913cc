"""Streaming a model's weights in changes no gradient on any family of a real host, and keeps no weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.host.inside import checkouts, run_inside
from tests.host.training.test_gradients import families

pytestmark = pytest.mark.host

SCRIPT = "inside_offload.py"


@pytest.fixture(scope="module", params=checkouts())
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One process per host version."""
    folder: Path = tmp_path_factory.mktemp("offload")
    run_inside(request.param, SCRIPT, folder)
    return dict(json.loads((folder / "offload.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("family", families())
def test_offload(report: dict[str, str], family: str) -> None:
    if family not in report:
        pytest.skip(f"this host has no {family}")
    assert report[family] == "", report[family]
