"""Distillation on pipelines: nearer to the teachers, all else as it was; the command, stopped and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_core.adapter.adapter import create
from spectral_core.attach.targets import find_targets
from spectral_core.cli.main import main
from spectral_core.errors import SpectralAdapterError
from spectral_core.files.adapter_file import load, save
from spectral_core.fusion import fuse
from spectral_core.methods import FouRAConfig, LoRAConfig
from spectral_core.pipelines import apply
from spectral_core.pipelines.conditioning import encode
from spectral_core.pipelines.distil import DistilJob, _samples, distil
from spectral_core.training.engine.named_run import Output
from spectral_core.training.objectives.distillation import DISTIL, examples

PROMPTS = [("a b", "b"), ("a c",)]
FAST = DistilJob(samples=2, preserve=("a",), sample_steps=2, size=(16, 16))


def concept(pipe: Any, config: Any, seed: int, word: str, parts: tuple[str, ...] = ("unet",)) -> Any:
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Any] = {}
    for part in parts:
        weights |= find_targets(getattr(pipe, part), part, "attention")[0]
    made = create(weights, config, generator=generator)

    def moved(_: str, term: Any) -> Any:
        params = {
            k: v if k.startswith("gate.") else 0.3 * torch.randn(v.shape, generator=generator)
            for k, v in term.params.items()
        }
        return replace(term, params=params)

    return made.map_terms(moved).with_provenance(name=word, trigger_words=(word,))


@pytest.fixture(scope="module")
def adapters(pipe: Any) -> list[Any]:
    both = ("unet", "text_encoder")
    return [concept(pipe, LoRAConfig(2), 1, "b", both), concept(pipe, FouRAConfig(2), 2, "c")]


def distance(pipe: Any, fused: Any, adapters: list[Any]) -> float:
    """Mean square between the fused adapter's predictions and the concepts' own, on other noise."""
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    total = 0.0
    for adapter, prompts in zip(adapters, PROMPTS, strict=True):
        found = []
        for one in (adapter, fused):
            with torch.no_grad(), apply(pipe, one):
                told = encode(pipe, [prompts[0]] * 4, (16, 16))
                found.append(pipe.unet(x, torch.tensor([100, 300, 600, 900]), **told).sample)
        total += float((found[0] - found[1]).square().mean())
    return total


def test_the_student_comes_nearer_and_the_pipeline_is_as_it_was(
    pipe: Any, adapters: list[Any], tmp_path: Path
) -> None:
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    fused = fuse(adapters, "average", freeze_gates=True).adapter
    config = replace(DISTIL, steps=60, learning_rate=3e-2)
    drawn: list[int] = []
    output = Output(tmp_path, "both")
    done = distil(pipe, fused, adapters, PROMPTS, FAST, config, output, on_sample=drawn.append)
    assert sum(drawn) == 6 and len(done.result.losses) == 60
    assert distance(pipe, done.adapter, adapters) < 0.9 * distance(pipe, fused, adapters)
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert "forward" not in vars(pipe.unet)
    assert not any("forward" in vars(m) for m in pipe.unet.modules())
    assert done.adapter.mergeable and done.adapter.layers.keys() == fused.layers.keys()
    text = next(name for name in fused.layers if name.startswith("text_encoder"))
    told = done.adapter.layers[text].factors(), fused.layers[text].factors(fused.strength_of(text))
    deltas = [f.scale * f.up @ f.down for f in told]
    assert torch.allclose(*deltas, atol=1e-6), "text encoders stay as they were fused"
    training = done.adapter.provenance.training
    assert training["distilled"]["samples"] == 2 and training["fusion"]["method"] == "average"
    assert [p["name"] for p in done.adapter.provenance.parents] == ["b", "c"]
    short = replace(config, steps=2)
    twice = [
        distil(pipe, fused, adapters, PROMPTS, FAST, short, Output(tmp_path / name, "both"))
        for name in ("one", "two")
    ]
    assert twice[0].adapter.content_hash == twice[1].adapter.content_hash and not twice[1].reused


def test_samples_are_what_each_concepts_own_adapter_draws(pipe: Any, adapters: list[Any]) -> None:
    shown, places = examples(PROMPTS, ("a",), 3, 0.1)
    drawn = _samples(pipe, FAST, adapters, shown, places, 7, None)
    told = ["a b", "b", "a b", "a c", "a c", "a c", "a", "a", "a"]
    assert len(drawn) == len(told)
    for number, (latent, prompt) in enumerate(zip(drawn, told, strict=True)):
        with apply(pipe, *adapters[number // 3 : number // 3 + 1]):
            expected = pipe(
                prompt, num_inference_steps=2, guidance_scale=4.0, width=16, height=16, output_type="latent",
                generator=torch.Generator().manual_seed(7 + number),
            ).images[0]  # fmt: skip
        assert torch.allclose(latent, expected, atol=1e-4), number


def test_what_cannot_be_distilled_is_said(pipe: Any, adapters: list[Any], tmp_path: Path) -> None:
    output = Output(tmp_path, "both")
    fused = fuse(adapters, "average", freeze_gates=True).adapter
    with pytest.raises(SpectralAdapterError, match="adaptive gate"):
        distil(pipe, adapters[1], adapters, PROMPTS, FAST, DISTIL, output)
    with pytest.raises(SpectralAdapterError, match="prompts of 1 concepts for 2"):
        distil(pipe, fused, adapters, PROMPTS[:1], FAST, DISTIL, output)
    with pytest.raises(SpectralAdapterError, match="needs a prompt"):
        distil(pipe, fused, adapters, [("a",), ()], FAST, DISTIL, output)
    words = concept(pipe, LoRAConfig(2), 3, "b", ("text_encoder",))
    with pytest.raises(SpectralAdapterError, match="no layer of the denoiser"):
        distil(pipe, words, adapters, PROMPTS, FAST, DISTIL, output)
    drawn: list[int] = []
    two = [adapters[0], adapters[1].scaled(0.0)]
    one = replace(DISTIL, steps=1)
    distil(pipe, fused, two, [("a b",), ()], FAST, one, output, on_sample=drawn.append)
    assert sum(drawn) == 4, "strength 0 is left out"
    for wrong in ({"samples": 0}, {"sample_steps": 0}):
        with pytest.raises(SpectralAdapterError):
            DistilJob(**wrong)


def test_the_command(
    pipe: Any, adapters: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    files = [str(save(a, tmp_path / f"{a.provenance.name}.safetensors")) for a in adapters]
    command = [
        "distil",
        "--model",
        str(tmp_path / "model"),
        "--adapter",
        files[0],
        "--adapter",
        f"{files[1]}:0.5",
    ]
    command += ["--samples", "2", "--sample-steps", "2", "--size", "16", "--device", "cpu", "--preserve", "-"]
    command += ["--output", str(tmp_path / "out"), "--run-name", "both"]
    assert main([*command, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "b as: a b, a picture of a b" in said and "closed-form of b × 1, c × 0.5" in said
    made = load(tmp_path / "out" / "both.safetensors")
    assert made.mergeable and made.provenance.name == "both" and made.provenance.trigger_words == ("b", "c")
    assert main([*command, "--steps", "2"]) == 0 and "finished already (2 steps)" in capsys.readouterr().out
    fused = ["--fused", str(tmp_path / "out" / "both.safetensors")]
    assert main([*command, "--steps", "2", *fused]) == 0
    assert (tmp_path / "out" / "both-2.safetensors").is_file(), "another beginning is another run"
    assert main([*command, *fused, "--rank", "1"]) == 1 and "--fused and --rank" in capsys.readouterr().err
    small = [*command, "--steps", "1", "--rank", "1", "--prompts", "a b|b", "--run-name", "small"]
    assert main(small) == 0 and "b as: a b, b\n" in capsys.readouterr().out
    ranks = {layer.factors().rank for layer in load(tmp_path / "out" / "small.safetensors").layers.values()}
    assert ranks == {1}
    assert main(["distil", "--model", "x"]) == 2


def test_a_stopped_command_goes_on_to_the_same_file(
    pipe: Any, adapters: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectral_core.training.engine.trainer import Trainer

    pipe.save_pretrained(tmp_path / "model")
    files = [str(save(a, tmp_path / f"{a.provenance.name}.safetensors")) for a in adapters]
    command = ["distil", "--model", str(tmp_path / "model"), "--adapter", files[0], "--adapter", files[1]]
    command += ["--samples", "2", "--sample-steps", "2", "--size", "16", "--device", "cpu", "--steps", "4"]
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    own = Trainer._check
    steps: list[int] = []

    def interrupted(self: Any, *given: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return own(self, *given)

    monkeypatch.setattr(Trainer, "_check", interrupted)
    assert main([*command, "--output", str(tmp_path / "parts")]) == 130
    assert (tmp_path / "parts" / ".runs" / "distilled" / "stopped.safetensors").is_file()
    monkeypatch.undo()
    kept = "what it began with is kept"
    monkeypatch.setattr("spectral_core.cli.distil._closed_form", lambda *_: pytest.fail(kept))
    assert main([*command, "--output", str(tmp_path / "parts")]) == 0
    whole, parts = (load(tmp_path / kind / "distilled.safetensors") for kind in ("whole", "parts"))
    assert whole.content_hash == parts.content_hash
