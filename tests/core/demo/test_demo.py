"""The main job from end to end with few steps: every file it promises, reuse, the user's own pictures, bad
input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spectral_core.demo import command as demo
from spectral_core.demo import run as demo_run
from spectral_core.demo.run import DemoSettings
from spectral_core.files.adapter_file import load


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sampling steps and two pictures per concept; everything else as users run it."""
    pytest.importorskip("diffusers")
    full = demo_run.default_settings

    def quick(pipe: Any, options: Any) -> DemoSettings:
        return replace(full(pipe, options), sample_steps=3, per_prompt=2)

    monkeypatch.setattr(demo, "default_settings", quick)


def read(output: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return report


def test_the_whole_job_and_its_reuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    assert demo.main(["--output", str(output), "--steps", "4"]) == 0
    report = read(output)
    assert [(t["concept"], t["method"], t["reused"]) for t in report["trainings"]] == [
        (c, m, False) for m in ("foura", "spectral_a") for c in ("<bot>", "<fish>")
    ]
    for name in ("contact_sheet.png", "gate_heatmap.png", "spectrum.png"):
        with Image.open(output / name) as picture:
            assert picture.width > 300 and picture.height > 100
    columns = [
        load(output / "adapters" / f"{c}_spectral_a.safetensors").layers.values() for c in ("bot", "fish")
    ]
    used = [
        {i for layer in layers for i in layer.terms[0].config.columns}  # type: ignore[union-attr]
        for layers in columns
    ]
    assert used[0] and used[1] and not used[0] & used[1], "each concept must have columns of its own"
    for fusion in report["fusions"]:
        assert set(fusion["retention"]) == {"<bot>", "<fish>"}
    assert {r["row"] for r in report["concepts"][0]["rows"]} >= {
        "base model",
        "FouRA: stacked",
        "Spectral A: fused",
    }

    def never(*_: object) -> None:
        raise AssertionError("a second run must reuse the trained adapters")

    monkeypatch.setattr(demo_run, "train_one", never)
    assert demo.main(["--output", str(output), "--steps", "4"]) == 0
    again = read(output)
    assert all(t["reused"] for t in again["trainings"])
    assert again["concepts"] == report["concepts"], "same adapters, same seeds, same scores"
    with pytest.raises(AssertionError, match="must reuse"):
        demo.main(["--output", str(output), "--steps", "5"])


def test_the_users_own_pictures(tmp_path: Path, pictures: Path) -> None:
    output = tmp_path / "out"
    assert (
        demo.main(["--images", str(pictures), "--token", "thing", "--output", str(output), "--steps", "2"])
        == 0
    )
    assert [c["concept"] for c in read(output)["concepts"]] == ["<thing>", "<bot>"]
    assert load(output / "adapters" / "thing_foura.safetensors").provenance.trigger_words == ("<thing>",)


def test_another_model(tmp_path: Path, pictures: Path, pipe: Any) -> None:
    """A diffusers folder; one concept, so nothing to fuse; the methods' own learning rates."""
    pipe.save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    arguments = [
        "--model",
        str(tmp_path / "model"),
        "--images",
        str(pictures),
        "--token",
        "x",
        "--steps",
        "2",
    ]
    assert demo.main([*arguments, "--output", str(output)]) == 0
    report = read(output)
    assert report["fusions"] == [] and len(report["concepts"]) == 1 and report["settings"]["size"] == 16
    assert [t["learning_rate"] for t in report["trainings"]] == [1e-4, 1e-3]
    assert demo.main([*arguments, "--output", str(output), "--size", "17"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "{tmp}/nowhere", "--token", "x"], "not a folder"),
        (["--images", "{tmp}"], "give each folder of pictures its own token"),
        (["--images", "{tmp}", "--token", "x"], "no pictures found"),
        (["--model", "{tmp}/nothing.safetensors"], "add --images"),
        (["--steps", "0"], "steps 0"),
        (["--rank", "-1"], "rank -1"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    assert demo.main([*filled, "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and "Traceback" not in said
