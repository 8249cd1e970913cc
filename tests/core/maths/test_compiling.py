"""Whether torch is compiling, on a torch that has no ``torch.compiler.is_compiling`` (before 2.3) too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spectral_core.maths import compiling

CORE = Path(compiling.__file__).parents[1]


def test_an_old_torch_is_asked_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import external_utils

    monkeypatch.delattr(torch.compiler, "is_compiling")
    monkeypatch.setattr(external_utils, "is_compiling", lambda: True, raising=False)  # gone in newer ones
    assert compiling._asked()() is True


def test_nobody_else_asks() -> None:
    files = [path for path in CORE.rglob("*.py") if "torch.compiler.is_compiling" in path.read_text("utf-8")]
    assert files == [CORE / "maths" / "compiling.py"]
