"""The page's JavaScript by itself, with node's own test runner; skipped where there is no node."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.conftest import ROOT


def test_units_of_the_page() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node: the page's units are not tested")
    files = sorted(str(file) for file in (ROOT / "tests" / "js").glob("*.test.mjs"))
    done = subprocess.run([node, "--test", *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
