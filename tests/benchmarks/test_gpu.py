"""The GPU table runs from end to end, on tiny models and the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from benchmarks.speed import gpu
from tests.host.booted import Checkout
from tests.host.inside import checkouts


def test_dry_run(tmp_path: Path) -> None:
    assert gpu.main(["--dry-run", "--parts", "training", "use"], tmp_path) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert {(row["model"], row["what"]) for row in rows} == {
        (name, what) for name in gpu.SIZES for what in ("training step", "pass")
    }
    assert {row["name"] for row in rows if row["what"] == "training step"} == {gpu.PEER, *gpu.methods(8)}


def test_when_time_is_up_it_says_what_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--models", "dit", "--minutes", "-1"], tmp_path) == 0
    assert "dit: training, dit: use, dit: compiled" in capsys.readouterr().err


def test_without_a_host_the_offload_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find_checkouts", list)
    assert gpu.main(["--dry-run", "--models", "dit", "--parts", "offload"], tmp_path) == 0
    assert "offload (needs a ComfyUI in COMFYUI_PATH)" in capsys.readouterr().err


@pytest.mark.host
@pytest.mark.parametrize("checkout", checkouts())
def test_offload_on_a_host(checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_checkouts", lambda: [checkout])
    assert gpu.main(["--dry-run", "--models", "dit", "--parts", "offload"], tmp_path) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["none", "half", "all"] and all(
        row["seconds"] > 0 for row in rows
    )
