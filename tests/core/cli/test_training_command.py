"""The commands from end to end on a tiny diffusers folder: train, resume, fuse, export, info, generate."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spectral_core.cli import options as opt
from spectral_core.cli.main import main, parser
from spectral_core.files.adapter_file import load
from spectral_core.pipelines.job import Job
from spectral_core.pipelines.train import train_adapter
from spectral_core.training.config import reading
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.named_run import Output
from spectral_core.training.runs.events import read_events

FAST = ["--steps", "4", "--size", "16", "--rank", "2", "--learning-rate", "0.01", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_ADAPTERS_CACHE", str(tmp_path / "cache"))


def test_train_fuse_export_info_and_generate(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapters"
    (tmp_path / "run.json").write_text(json.dumps({"method": "spectral_a", "steps": 99, "gate": "none"}))
    common = ["train", "--model", str(model), "--images", str(pictures), "--output", str(out), *FAST]
    first = [*common, "--token", "<cat>", "--config", str(tmp_path / "run.json"), "--sample-every", "2"]
    assert main(first) == 0
    folder = out / ".runs" / "cat"
    assert load(out / "cat.safetensors").layers["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert [p.name for p in sorted((folder / "samples").iterdir())] == [
        "step-00000002-0.png",
        "step-00000004-0.png",
    ]
    assert (out / "cat.preview.png").is_file(), "the last sample is the file's cover"
    assert main(first) == 0 and "finished already (4 steps)" in capsys.readouterr().out
    assert main([*common, "--token", "<dog>", "--method", "spectral_a"]) == 0
    columns = [
        {c for layer in load(out / f"{n}.safetensors").layers.values() for c in layer.terms[0].config.columns}  # type: ignore[union-attr]
        for n in ("cat", "dog")
    ]
    assert columns == [{0, 1}, {2, 3}], "the second concept takes the next free block"
    capsys.readouterr()
    files = [str(out / f"{name}.safetensors") for name in ("cat", "dog")]
    fused = str(tmp_path / "both.safetensors")
    assert main(["fuse", *files, "--weights", "1", "0.5", "--method", "spectral", "-o", fused]) == 0
    assert main(["export", fused, "-o", str(tmp_path / "lora.safetensors")]) == 0
    capsys.readouterr()
    checkpoint = str(folder / "checkpoint-00000004.safetensors")
    assert main(["info", fused, str(tmp_path / "lora.safetensors"), checkpoint, "--json"]) == 0
    said = list(json.loads(capsys.readouterr().out).values())
    assert said[0]["methods"] == ["spectral_a"] and said[1]["methods"] == ["lora"]
    assert (said[2]["kind"], said[2]["step"], said[2]["learning_rate"]) == (
        "checkpoint of a training",
        4,
        0.01,
    )
    draw = ["generate", "--model", str(model), "--prompt", "a <cat>", "--steps", "2", "--size", "16"]
    drawn = tmp_path / "drawn"
    assert main([*draw, "--adapter", f"{files[0]}:0.5", "--count", "2", "--seed", "3", "-o", str(drawn)]) == 0
    assert [p.name for p in sorted(drawn.iterdir())] == ["000-seed3.png", "001-seed4.png"]
    composed = [*draw, "--composed", "-o", str(tmp_path / "composed")]
    assert main([*composed, *(word for file in files for word in ("--adapter", file))]) == 0
    assert main(composed) == 1 and "--adapter, at least once" in capsys.readouterr().err
    assert main(["fuse", *files, "-o", fused]) == 1 and "exists already" in capsys.readouterr().err


def test_interrupted_and_resumed_equals_uninterrupted(
    model: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the finished files say the same of themselves; masks, buckets, prior pictures and both parts
    train."""
    Image.new("RGB", (40, 16), "white").save(pictures / "wide.png")
    Image.new("L", (24, 16), 128).save(pictures / "1.mask.png")
    common = ["train", "--model", str(model), "--images", str(pictures), "--token", "<x>", *FAST, "--json"]
    common += [
        "--batch-size",
        "2",
        "--buckets",
        "--text-targets",
        "attention",
        "--prior-images",
        str(pictures),
    ]
    assert main([*common, "--output", str(tmp_path / "whole")]) == 0
    from spectral_core.cli import train as command

    listener = command.listener

    def interrupting(as_json: bool) -> Any:
        tell = listener(as_json)

        def listen(event: dict[str, Any]) -> None:
            tell(event)
            if event["event"] == "step" and event["step"] == 2:
                signal.raise_signal(signal.SIGTERM if event["steps"] == 4 else signal.SIGINT)

        return listen

    monkeypatch.setattr(command, "listener", interrupting)
    again = [*common, "--output", str(tmp_path / "halves")]
    assert main(again) == 130
    said = capsys.readouterr()
    assert "stopped at step 2 of 4; the same command goes on" in said.err
    stopped = load(tmp_path / "halves" / ".runs" / "x" / "stopped.safetensors")
    monkeypatch.setattr(command, "listener", listener)
    assert main(again) == 0
    files = [tmp_path / part / "x.safetensors" for part in ("whole", "halves")]
    whole, resumed = (load(file) for file in files)
    assert resumed.content_hash == whole.content_hash != stopped.content_hash
    assert resumed.provenance == whole.provenance
    assert set(whole.parts) == {"unet", "text_encoder"} and "<x>" in whole.tokens
    moved = [n for n, v in whole.layers.items() if v.terms[0].params["b"].abs().max() > 0]
    assert {n.split(".")[0] for n in moved} == {"unet", "text_encoder"}
    events = read_events(tmp_path / "halves" / ".runs" / "x" / "events.jsonl")
    kinds = [e["event"] for e in events]
    assert kinds.count("step") == 4 and "resume" in kinds and kinds[-1] == "finished"
    assert "1 of 4 pictures have no caption file (wide.png)" in capsys.readouterr().out


def test_a_named_run_is_returned_moved_aside_or_extended(pipe: Any, pictures: Path, tmp_path: Path) -> None:
    job = Job(str(pictures), "<x>", method="lora", rank=2, size=(16, 16), init_words="")
    output = Output(tmp_path / "out", "x", cache_folder=tmp_path / "cache")
    config = TrainConfig(steps=3, learning_rate=1e-2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x-2.safetensors").write_bytes(b"somebody else's")
    first = train_adapter(pipe, job, config, output)
    assert not first.reused and first.path.name == "x.safetensors" and not first.adapter.tokens
    again = train_adapter(pipe, job, config, output)
    assert again.reused and again.adapter.content_hash == first.adapter.content_hash
    other = train_adapter(pipe, job, TrainConfig(steps=3, learning_rate=2e-2), output)
    assert other.path.name == "x-2-2.safetensors" and "run x has other settings" in other.notes[0]
    longer = train_adapter(
        pipe, job, TrainConfig(steps=5, learning_rate=1e-2), Output(tmp_path / "out", "x", extend=True)
    )
    assert longer.place.name == "x" and len(longer.result.losses) == 5 and longer.path.name == "x.safetensors"
    assert any("is a new schedule" in note for note in longer.notes)
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 3
    (pictures / "0.txt").write_text("another caption", encoding="utf-8")
    assert train_adapter(pipe, job, config, output).place.name == "x-3", "other captions are another run"


def test_frozen_gates_and_memory_saving(pipe: Any, pictures: Path, tmp_path: Path) -> None:
    """Checkpointing changes the result by rounding alone; frozen gates make the adapter mergeable."""
    job = Job(str(pictures), "<x>", rank=2, size=(16, 16))
    seen = []
    for mode in ("none", "selective", "full"):
        config = TrainConfig(steps=3, learning_rate=1e-2, checkpointing=mode, freeze_gates=True)
        done = train_adapter(pipe, job, config, Output(tmp_path / mode, "x"))
        assert done.adapter.mergeable and done.result.gates is not None
        terms = [term for layer in done.adapter.layers.values() for term in layer.terms]
        seen.append(torch.cat([term.params[key].flatten() for term in terms for key in ("a", "b")]))
    assert seen[0].any() and (seen[1] - seen[0]).norm() <= 1e-5 * seen[0].norm() >= (seen[2] - seen[0]).norm()


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--images", "{tmp}/nowhere"], "not a folder", 1),
        (["--images", "{tmp}/empty"], "no pictures found", 1),
        (["--images", "{tmp}/broken"], "cannot be read as a picture", 1),
        (["--size", "17"], "expected multiples of 2 pixels", 1),
        (["--steps", "0"], "steps 0", 1),
        (["--rank", "0"], "rank 0", 1),
        (["--rank", "4000", "--method", "spectral_r"], "every layer is smaller", 1),
        (["--targets", "nothing.*"], "no layer matches", 1),
        (["--processes", "2"], "expected 2", 1),
        (["--device", "cuda:7"], "device", 1),
        (["--config", "{tmp}/typo.json"], "unknown setting 'step': did you mean 'steps'", 1),
        (["--config", "{tmp}/typed.json"], "buckets 'yes': expected true or false", 1),
        (["--run-name", "../x"], "expected a plain name", 1),
        (["--precision", "int8"], "invalid choice", 2),
        (["--columns", "a-b"], "expected something like 0-7", 2),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_line_before_the_first_step(
    arguments: list[str],
    message: str,
    code: int,
    model: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    pipe: Any,
) -> None:
    from spectral_core.cli import train as command

    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "typo.json").write_text('{"step": 5}')
    (tmp_path / "typed.json").write_text('{"buckets": "yes"}')
    if arguments[0] != "--device":
        monkeypatch.setattr(command, "open_model", lambda *_: pipe)
    filled = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    base = ["train", "--model", str(model), "--images", str(pictures), "--token", "<x>"]
    try:
        found = main([*base, "--output", str(tmp_path / "out"), *FAST, *filled])
    except SystemExit as stopped:
        found = int(stopped.code or 0)
    said = capsys.readouterr().err
    assert found == code and message in said and "Traceback" not in said


def test_what_is_odd_is_said_before_the_first_step(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate of 10, columns that are taken, captions that are missing, layers that are too small."""
    Image.new("RGB", (16, 16), "red").save(pictures / "uncaptioned.png")
    common = ["train", "--model", str(model), "--images", str(pictures), "--output", str(tmp_path), *FAST]
    common += ["--method", "spectral_a", "--columns", "0-1", "--explosion", "0", "--steps", "1"]
    assert main([*common, "--token", "<a>"]) == 0
    capsys.readouterr()
    assert main([*common, "--token", "<b>", "--json", "--learning-rate", "10"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first = next(i for i, e in enumerate(events) if e["event"] == "step")
    said = "\n".join(e["text"] for e in events[:first] if e["event"] == "warning")
    assert "columns 0–1 are taken by a" in said
    assert "learning_rate 10 is 10000 times the default of spectral_a" in said
    assert "pictures have no caption file" in said
    assert main([*common, "--token", "<c>", "--json", "--method", "lora", "--rank", "40"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert any("rank 40 is above the size of" in e.get("text", "") for e in events[:3])


def test_out_of_memory_is_one_line_with_what_to_do(
    pipe: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectral_core.errors import SpectralAdapterError
    from spectral_core.pipelines import train as pipelines

    def denoiser_of(*_: Any) -> Any:
        def lacking(*_: Any) -> Any:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

        return lacking

    monkeypatch.setattr(pipelines, "denoiser_of", denoiser_of)
    with pytest.raises(SpectralAdapterError, match=r"run x: out of memory .*: lower batch_size"):
        train_adapter(pipe, Job(str(pictures), "<x>", size=(16, 16)), TrainConfig(), Output(tmp_path, "x"))


def test_options_of_the_command_line_and_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reading.columns("0-2, 7") == (0, 1, 2, 7) and reading.size("768x512") == (768, 512)
    assert reading.size("64") == (64, 64) and reading.pair("0.9,0.5") == (0.9, 0.5)
    pytest.importorskip("tomllib")
    path = tmp_path / "a.toml"
    path.write_text('columns = "0-3"\nsize = [64, 32]\nsample_prompts = ["a", "b"]\nlearning_rate = 1\n')
    from spectral_core.cli.train import groups

    known = [o for found in groups().values() for o in found]
    values = opt.gather(parser().parse_args(["train", "--size", "16"]), path, known)
    assert values == {
        "columns": (0, 1, 2, 3),
        "size": (16, 16),
        "sample_prompts": ["a", "b"],
        "learning_rate": 1.0,
    }
    names = {o.name for o in known}
    assert set(TrainConfig().as_dict()) <= names and set(Job("x", "y").settings()) <= names
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "default: 500" in capsys.readouterr().out
    assert main(["train", "--token", "<x>"]) == 2 and "--model --images missing" in capsys.readouterr().err
    assert torch.get_rng_state() is not None


def test_held_out_pictures_judge_a_run_and_its_best_is_kept(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapters"
    common = ["train", "--model", str(model), "--images", str(pictures), "--token", "<x>", *FAST, "--json"]
    common += ["--output", str(out), "--learning-rate", "1", "--explosion", "0", "--validation-every", "2"]
    assert main([*common, "--steps", "8", "--validation-share", "0.5"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    held = {e["step"]: e["held_out_loss"] for e in told if "held_out_loss" in e}
    assert list(held) == [2, 4, 6, 8] and held[8] > min(held.values()), "the rate is far too high"
    best = min(held, key=lambda step: held[step])
    kept, last = load(out / "x-best.safetensors"), load(out / "x.safetensors")
    assert kept.provenance.training["steps_done"] == best and kept.content_hash != last.content_hash
    ended = [*common, "--steps", "40", "--validation-images", str(pictures), "--patience", "1"]
    assert main([*ended, "--run-name", "early"]) == 0
    steps = [e["step"] for e in read_events(out / ".runs/early/events.jsonl") if e["event"] == "step"]
    assert steps[-1] < 40 and not (out / "early-best.safetensors").exists(), "it is the best itself"
    capsys.readouterr()
    assert main([*ended, "--run-name", "early"]) == 0
    assert "finished already" in capsys.readouterr().err
    assert main([*ended, "--run-name", "both", "--validation-share", "0.5"]) == 1
    assert "a share or a folder; set one of them" in capsys.readouterr().err


def test_the_model_is_kept_beside_the_concept_by_its_own_predictions(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", "--model", str(model), "--images", str(pictures), "--token", "<x>", *FAST, "--json"]

    def kept(*more: str) -> list[int]:
        assert main([*common, "--output", str(tmp_path / "-".join(("out", *more))), *more]) == 0
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return [e["step"] for e in told if "preservation_loss" in e]

    assert kept() == [1] and kept("--preserve-every", "2") == [1, 3] and kept("--preserve-every", "0") == []
    assert kept("--preserve-prompts", "a dog | a cat", "--class-words", "pet") == [1]
