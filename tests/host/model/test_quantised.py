"""Quantised weights of a real host: applied live and merged, trained on, and untouched afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.host.booted import Checkout
from tests.host.inside import checkouts, run_inside

pytestmark = pytest.mark.host

SCRIPT = "inside_quantised.py"
CASES = [
    f"{family} {form}"
    for family in ("wan2.1", "qwen-image", "flux", "z-image", "ltxv")
    for form in ("float8_e4m3fn", "int8_tensorwise")
]


@pytest.fixture(scope="module", params=checkouts())
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One process per host version."""
    folder: Path = tmp_path_factory.mktemp("quantised")
    run_inside(request.param, SCRIPT, folder)
    return dict(json.loads((folder / "quantised.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("case", [*CASES, "never called"])
def test_quantised(report: dict[str, str], case: str) -> None:
    if case not in report:
        pytest.skip(f"this host has no {case}")
    assert report[case] == "", report[case]


@pytest.mark.parametrize("checkout", checkouts())
def test_a_quantised_base_stays_so_while_it_trains(checkout: Checkout, tmp_path: Path) -> None:
    """Counted: the base takes its file's bytes, and no pass keeps its weights in another form."""
    run_inside(checkout, "inside_bytes.py", tmp_path)
    whole, *rows = json.loads((tmp_path / "bytes.json").read_text(encoding="utf-8"))
    if not rows:
        pytest.skip("this host has no quantised format")
    for row in rows:
        assert row["base"] < 0.7 * whole["base"], row
        assert row["adapter"] == whole["adapter"]
        for mode in ("none", "selective", "full"):
            assert row[mode] < 1.02 * whole[mode], (mode, row, whole)
