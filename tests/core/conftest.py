"""A tiny random pipeline, built once; every test must leave it as it found it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("diffusers")
    from tests.core.pipelines.tiny import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three coloured pictures with captions."""
    from PIL import Image

    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (24, 16), colour).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"<TOK>, {colour}", encoding="utf-8")
    return tmp_path
