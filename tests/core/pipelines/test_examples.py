"""The examples in the docstrings of the front door's functions on pipelines, on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.test_front_door import WITH_DIFFUSERS, run_example

pytest.importorskip("diffusers")


@pytest.mark.parametrize("name", sorted(WITH_DIFFUSERS))
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_example(name, tmp_path, monkeypatch)
