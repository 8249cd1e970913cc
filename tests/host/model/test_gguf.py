"""GGUF models of ComfyUI-GGUF on a real host: their weights are read, and they train."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.host.inside import checkouts, run_inside

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif("COMFYUI_GGUF" not in os.environ, reason="no ComfyUI-GGUF: set COMFYUI_GGUF"),
]


@pytest.fixture(scope="module", params=checkouts())
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One process per host version."""
    folder: Path = tmp_path_factory.mktemp("gguf")
    run_inside(request.param, "inside_gguf.py", folder)
    return dict(json.loads((folder / "gguf.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_gguf(report: dict[str, str], kind: str) -> None:
    if "missing" in report:
        pytest.skip(f"ComfyUI-GGUF: {report['missing']}")
    assert report[kind] == "", report[kind]
