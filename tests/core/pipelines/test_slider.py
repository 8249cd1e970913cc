"""Sliders on pipelines: the command, resumed; composition; and on the embedded model a size that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_core.adapter.adapter import create
from spectral_core.attach.targets import find_targets
from spectral_core.cli.main import main
from spectral_core.demo.scores import as_tensor
from spectral_core.errors import SpectralAdapterError
from spectral_core.files.adapter_file import load
from spectral_core.methods import LoRAConfig
from spectral_core.pipelines import apply, generate, load_pipeline
from spectral_core.pipelines.composing import composed
from spectral_core.pipelines.slider import SliderJob, train_slider
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.named_run import START, Output
from tests.conftest import ROOT

FAST = {"samples": 2, "sample_steps": 2, "size": (16, 16), "rank": 2}


def test_a_slider_leaves_the_pipeline_as_it_was_and_has_its_schedule(pipe: Any, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    config = TrainConfig(steps=3, batch_size=2, learning_rate=1e-2)
    job = SliderJob("a b {}", "a c {}", "a {}", ("x", "y"), **FAST)
    done = train_slider(pipe, job, config, Output(tmp_path, "size"))
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert "forward" not in vars(pipe.unet) and len(done.result.losses) == 3
    schedule = done.adapter.schedule
    assert schedule is not None and schedule.at(0.19) == 0 and schedule.at(0.2) == 1
    assert done.adapter.provenance.name == "size"
    assert done.adapter.provenance.training["slider"]["positive"] == "a b {}"
    again = train_slider(pipe, job, config, Output(tmp_path / "again", "size"))
    assert again.adapter.content_hash == done.adapter.content_hash and not again.reused
    assert train_slider(pipe, job, config, Output(tmp_path, "size")).reused
    for lost in (done.path, done.place.folder / START):
        lost.unlink()
    found = train_slider(pipe, job, config, Output(tmp_path, "size"))
    assert found.adapter.content_hash == done.adapter.content_hash and "made anew" in found.notes[0]
    always = SliderJob("a b", "a c", "a", start=0.0, method="spectral_a", **FAST)
    assert train_slider(pipe, always, config, Output(tmp_path, "all")).adapter.schedule is None


@pytest.mark.parametrize(
    "wrong",
    [{"positive": ""}, {"negative": "p"}, {"start": 1.0}, {"eta": 0}, {"method": "dora"}, {"samples": 0}],
)
def test_wrong_jobs(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpectralAdapterError):
        SliderJob(**{"positive": "p", "negative": "n", **wrong})


def test_the_command(pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.save_pretrained(tmp_path / "model")
    command = ["slider", "--model", str(tmp_path / "model"), "--positive", "a b", "--negative", "a c"]
    command += ["--samples", "2", "--sample-steps", "2", "--size", "16", "--rank", "2", "--device", "cpu"]
    command += ["--output", str(tmp_path / "out"), "--run-name", "age", "--learning-rate", "0.01"]
    assert main([*command, "--steps", "2"]) == 0
    made = tmp_path / "out" / "age.safetensors"
    assert load(made).schedule is not None
    assert main([*command, "--steps", "2"]) == 0 and "finished already (2 steps)" in capsys.readouterr().out
    assert main([*command, "--steps", "3"]) == 0
    assert (tmp_path / "out" / "age-2.safetensors").is_file(), "other settings are another run"
    assert main(["slider", "--model", "x", "--positive", "a"]) == 2
    theirs = tmp_path / "out" / "age-3.safetensors"
    theirs.write_bytes(b"somebody's")
    assert main([*command, "--steps", "4"]) == 0
    assert theirs.read_bytes() == b"somebody's" and load(tmp_path / "out" / "age-3-2.safetensors")
    assert main([*command, "--steps", "4"]) == 0 and "age-3-2" in capsys.readouterr().out


def lora(pipe: Any, seed: int) -> Any:
    weights, _ = find_targets(pipe.unet, "unet", "attention")
    generator = torch.Generator().manual_seed(seed)
    made = create(weights, LoRAConfig(2), generator=generator)

    def moved(_: str, term: Any) -> Any:
        params = {k: 0.5 * torch.randn(v.shape, generator=generator) for k, v in term.params.items()}
        return type(term)(term.config, params)

    return made.map_terms(moved)


def test_composition_adds_what_each_adapter_alone_changes(pipe: Any) -> None:
    one, two = lora(pipe, 1), lora(pipe, 2)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    words = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(4))

    def call() -> torch.Tensor:
        with torch.no_grad():
            return pipe.unet(x, 500, encoder_hidden_states=words).sample

    base = call()
    alone = []
    for adapter in (one, two):
        with apply(pipe, adapter):
            alone.append(call() - base)
    with composed(pipe, [one, two], [0.5, -2.0]):
        assert torch.allclose(call() - base, 0.5 * alone[0] - 2.0 * alone[1], atol=1e-5)
    with composed(pipe, [one.scaled(0.0), two]):
        assert torch.allclose(call() - base, alone[1], atol=1e-5)
    assert torch.equal(call(), base) and "forward" not in vars(pipe.unet)
    with pytest.raises(SpectralAdapterError, match="1 weights for 2"), composed(pipe, [one, two], [1.0]):
        pass


SEEN = ("red star on a blue background", "green circle on a black background")
SEEN += ("yellow heart on a gray background", "purple square on a white background")
UNSEEN = ("blue heart on a black background", "orange ring on a gray background")
UNSEEN += ("green star on a white background", "purple cross on a green background")


def test_size_follows_the_strength_on_the_embedded_model(tmp_path: Path) -> None:
    """Learned on four subjects from prompts alone, measured on four others by the shipped classifier."""
    pytest.importorskip("diffusers")
    from demo_model.classifier import load_classifier

    drawn = load_pipeline(ROOT / "demo_model")
    reader = load_classifier(ROOT / "demo_model" / "classifier")
    job = SliderJob("a large {}", "a small {}", "a {}", SEEN, start=0.0, samples=8, sample_steps=8)
    config = TrainConfig(steps=40, batch_size=4, learning_rate=5e-3, schedule="cosine", warmup=4)
    slider = train_slider(drawn, job, config, Output(tmp_path, "size")).adapter
    prompts = [f"a {subject}" for subject in UNSEEN] * 2
    wanted = {"colour": 0, "shape": 1, "background": 4}
    large = []
    for strength in (-1.0, 0.0, 1.0):
        with apply(drawn, slider.scaled(strength)):
            pictures = generate(drawn, prompts, range(30, 38), steps=8, guidance=4.0, size=(128, 128))
        found = reader.attributes(as_tensor(pictures))
        large.append(sum(size == "large" for size in found["size"]) / len(prompts))
        for attribute, word in wanted.items():
            kept = [f == p.split()[word + 1] for f, p in zip(found[attribute], prompts, strict=True)]
            assert sum(kept) >= 0.75 * len(kept), (strength, attribute, found[attribute])
    assert large[0] < large[1] < large[2] and large[0] <= 0.25 and large[2] >= 0.75, large
