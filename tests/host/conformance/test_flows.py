"""A user's whole way through the nodes on small models of today's families, on a real host."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.host.inside import checkouts, run_inside, script_path

pytestmark = pytest.mark.host

SCRIPT = "inside_flows.py"


def checks() -> list[str]:
    """The names in the list of a script that only a host's Python can import."""
    tree = ast.parse(script_path(SCRIPT).read_text(encoding="utf-8"))
    assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
    (found,) = (n.value for n in assigned if ast.unparse(n.targets[0]) == "FLOW_CHECKS")
    assert isinstance(found, ast.List)
    return [ast.unparse(element) for element in found.elts]


@pytest.fixture(scope="module", params=checkouts())
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One process per host version."""
    folder: Path = tmp_path_factory.mktemp("flows")
    run_inside(request.param, SCRIPT, folder)
    return dict(json.loads((folder / "flows.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("check", checks())
def test_flow(report: dict[str, str], check: str) -> None:
    assert report[check] == "", report[check]
