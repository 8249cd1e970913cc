"""The main job from end to end with few steps: every file it promises, reuse, the user's own pictures, bad
input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo_model.draw import draw_concept
from spectral_core.demo import command as demo
from spectral_core.demo import run as demo_run
from spectral_core.demo.concepts import drawn_concept
from spectral_core.demo.run import DemoSettings
from spectral_core.demo.scores import Scorer
from spectral_core.files.adapter_file import load
from spectral_core.fusion import fuse
from spectral_core.pipelines.loading import EMBEDDED
from spectral_core.training.engine.trainer import Trainer
from spectral_core.training.runs.events import read_events


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
    fusions = report["fusions"]
    assert [fusion["method"] for fusion in fusions] == ["closed-form", "sum"] * 2
    for one, added in zip(fusions[::2], fusions[1::2], strict=True):
        for token in ("<bot>", "<fish>"):
            assert one["retention"][token] > added["retention"][token], (one["row"], token)
    assert {r["row"] for r in report["concepts"][0]["rows"]} >= {
        "base model",
        "FouRA: each alone",
        "FouRA: simply added",
        "Spectral A: in one adapter",
    }

    with Image.open(output / "contact_sheet.png") as sheet:
        drawn = len(report["concepts"][0]["rows"])
        assert sheet.height > (drawn + 1) * 128, "one row more: the pictures that were learned from"
    assert len(report["prompts"]) == 2 + 2 + 2 and "a large <bot> and a large <fish>" in report["prompts"][-1]
    rows = report["concepts"][0]["rows"]
    assert list(report["both_named"]) == [r["row"] for r in rows if "each alone" not in r["row"]]
    assert rows[0]["row"] == "base model" and rows[0]["named"] == 0.0, "it has never seen the character"

    made = {path: path.read_bytes() for path in (output / "adapters").glob("*.safetensors")}
    assert demo.main(["--output", str(output), "--steps", "4"]) == 0
    again = read(output)
    assert all(t["reused"] for t in again["trainings"])
    assert again["concepts"] == report["concepts"], "same adapters, same seeds, same scores"
    told = ("concept", "method", "loss_before", "loss_after", "seconds", "file")
    for one, other in zip(report["trainings"], again["trainings"], strict=True):
        assert [one[key] for key in told] == [other[key] for key in told]
        assert one["loss_after"] != one["loss_before"]
    monkeypatch.setattr(demo_run, "keep_each", lambda _pipe, _concepts, alone, _: fuse(alone, "sum"))
    assert demo.main(["--output", str(output), "--steps", "4", "--fresh"]) == 0
    fresh = read(output)["trainings"]
    assert [t["file"] for t in fresh][:2] == ["bot_foura-2.safetensors", "fish_foura-2.safetensors"]
    assert not any(t["reused"] for t in fresh)
    assert all(path.read_bytes() == before for path, before in made.items()), "nothing is overwritten"


def test_a_killed_demo_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second training, between two checkpoints; nothing that is finished trains again."""

    class Killed(BaseException):
        pass

    own, steps = Trainer._check, list[int]()

    def killing(trainer: Trainer, *given: Any) -> None:
        steps.append(trainer.step)
        if len(steps) == 4 + 4:  # the last step of the second training
            raise Killed
        own(trainer, *given)

    monkeypatch.setattr(demo_run, "KEPT_EVERY", 2)
    monkeypatch.setattr(demo_run, "evaluate", lambda *_: 0.0)
    monkeypatch.setattr(Trainer, "_check", killing)
    monkeypatch.setattr(Trainer, "_save_after", lambda *_: None)  # a kill leaves no time for it
    command = ["--steps", "4", "--output"]
    with pytest.raises(Killed):
        demo.main([*command, str(tmp_path / "killed")])
    monkeypatch.undo()
    monkeypatch.setattr(demo_run, "evaluate", lambda *_: 0.0)
    monkeypatch.setattr(demo, "generate_rows", lambda *_: [])
    monkeypatch.setattr(demo, "write_report", lambda *_: None)
    for name in ("killed", "whole"):
        assert demo.main([*command, str(tmp_path / name)]) == 0
    adapters = tmp_path / "killed" / "adapters"
    kinds = [
        [event["event"] for event in read_events(adapters / ".runs" / name / "events.jsonl")]
        for name in ("bot_foura", "fish_foura", "bot_spectral_a")
    ]
    assert [("resume" in kind, kind.count("step")) for kind in kinds] == [(False, 4), (True, 4), (False, 4)]
    whole = tmp_path / "whole" / "adapters"
    for file in ("bot_foura", "fish_foura", "bot_spectral_a", "fish_spectral_a"):
        one, other = (load(folder / f"{file}.safetensors") for folder in (adapters, whole))
        assert one.content_hash == other.content_hash, file


def test_the_users_own_pictures(tmp_path: Path, pictures: Path) -> None:
    output = tmp_path / "out"
    assert (
        demo.main(["--images", str(pictures), "--token", "thing", "--output", str(output), "--steps", "2"])
        == 0
    )
    assert [c["concept"] for c in read(output)["concepts"]] == ["<thing>", "<bot>"]
    assert load(output / "adapters" / "thing_foura.safetensors").provenance.trigger_words == ("<thing>",)


def test_pictures_that_an_earlier_version_drew_are_replaced(tmp_path: Path) -> None:
    concept = drawn_concept("bot", tmp_path, 64)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert drawn_concept("bot", tmp_path, 64) == concept
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}, "written again"
    (tmp_path / "03.txt").write_text("something else", encoding="utf-8")
    drawn_concept("bot", tmp_path, 128)
    assert all(Image.open(path).size == (128, 128) for path in tmp_path.glob("*.png"))
    assert "<TOK>" in (tmp_path / "03.txt").read_text(encoding="utf-8")


def test_both_in_one_picture_are_found_in_their_own_half(tmp_path: Path) -> None:
    """Two characters drawn side by side; the wrong way round, or one of them twice, they are not."""
    concepts = [drawn_concept(name, tmp_path / name, 128) for name in ("bot", "fish")]
    scorer = Scorer(EMBEDDED)

    def pair(left: str, right: str, seed: int) -> Image.Image:
        picture = Image.new("RGB", (128, 128), (92, 140, 96))
        for name, x in ((left, 0), (right, 64)):
            drawn = draw_concept(name, seed, pixels=64)[0]
            picture.paste(drawn, (x, 32))
        return picture

    for left, right in (("bot", "fish"), ("fish", "bot"), ("bot", "bot"), ("fish", "fish")):
        found = scorer.both_named(concepts, [pair(left, right, seed) for seed in range(50, 58)])
        assert found > 0.8 if (left, right) == ("bot", "fish") else found < 0.2
    assert scorer.knows(concepts[0]) and not scorer.knows(replace(concepts[0], drawn=False))


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
