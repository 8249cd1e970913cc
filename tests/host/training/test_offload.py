"""Streaming a model's weights in changes no gradient on any family of a real host, and keeps no weight."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.host.inside import checkouts, run_inside, script_path

pytestmark = pytest.mark.host

SCRIPT = "inside_offload.py"


def families() -> list[str]:
    """The names in the table of a script that only a host's Python can import."""
    tree = ast.parse(script_path("inside_models.py").read_text(encoding="utf-8"))
    assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
    (found,) = (n.value for n in assigned if ast.unparse(n.targets[0]) == "FAMILIES")
    assert isinstance(found, ast.Dict)
    return [ast.literal_eval(key) for key in found.keys if key is not None]


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
