"""What goes wrong is said: before the first step where it can be known, else with the step and the layer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from spectral_core.errors import SpectralAdapterError
from spectral_core.methods import FouRAConfig, LoRAConfig, SpectralAConfig
from spectral_core.training.config.config import Optimiser, TrainConfig
from spectral_core.training.data.folder import Example
from spectral_core.training.engine import checks, optim
from spectral_core.training.engine.divergence import Watch
from spectral_core.training.engine.loop import train
from spectral_core.training.objectives.diffusion import FlowMatching
from spectral_core.training.runs import checkpoint
from spectral_core.training.runs.events import read_events
from spectral_core.training.runs.place import Run
from tests.core.training.training_toy import Toy


def test_a_loss_that_is_not_finite_names_step_and_layer_and_goes_back(tmp_path: Path) -> None:
    toy, kept = Toy(LoRAConfig(4)), {}

    def break_second_layer(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            kept["digest"] = toy.digest
        if event["event"] == "step" and event["step"] == 6:
            toy.model.second.weight.data[0, 0] = math.nan

    run = Run(tmp_path, checkpoint_every=2, listener=break_second_layer)
    wanted = (
        r"the loss became nan at step 7, first in layer net\.second: lower the learning rate \(now 0\.01\)"
    )
    with pytest.raises(SpectralAdapterError, match=wanted) as error:
        train(toy.setup, TrainConfig(steps=20, learning_rate=1e-2), "lora", run=run)
    assert "The adapter is back at step 5; the checkpoint of step 4 is kept" in str(error.value)
    assert toy.digest == kept["digest"], "step 6 gave no finite loss, step 5 did"
    assert [step for step, _ in checkpoint.listed(tmp_path)] == [4], "that of step 6 cannot be gone on from"
    assert read_events(tmp_path / "events.jsonl")[-1]["event"] == "error"


def test_a_gradient_that_is_not_finite_names_the_tensor() -> None:
    toy = Toy(LoRAConfig(4))

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf

    dict(toy.attachment.named_parameters())["net.second.up"].register_hook(spoil)
    with pytest.raises(
        SpectralAdapterError, match=r"gradient is not finite at step 1, in the gradient of net\.s"
    ):
        train(toy.setup, TrainConfig(steps=3), "lora")


def test_an_exploding_loss_stops_soon_and_a_learning_rate_of_ten_is_warned_of() -> None:
    toy, events = Toy(LoRAConfig(4)), []
    with pytest.raises(
        SpectralAdapterError, match=r"the loss explodes \(.*\) at step \d+, most changed net\."
    ):
        train(toy.setup, TrainConfig(steps=200, learning_rate=10.0), "lora", run=Run(listener=events.append))
    assert "learning_rate 10 is 100000 times the default of lora" in events[1]["text"]
    assert sum(e["event"] == "step" for e in events) < 20
    assert all(bool(torch.isfinite(p).all()) for p in toy.attachment.parameters())
    calm = TrainConfig(steps=3, learning_rate=10.0, explosion=0.0)
    train(Toy(LoRAConfig(4)).setup, calm, "lora")  # where nobody watches, nothing stops


def test_a_loss_that_falls_from_a_high_first_one_is_no_explosion() -> None:
    """The smoothed loss holds the first one longer than the median of the first ones does."""
    watch = Watch(5.0)
    assert not any(watch.add(loss, 1.0)[0] for loss in (132.0, 3.0, 1.0, 2.03, *[1.0] * 30))
    assert any(watch.add(loss, 1.0)[0] for loss in (3e3, 1e4, 3e4)), "what rises above it is one"
    assert Watch(5.0).add(1.0, 1.0) == (False, True)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"latents": torch.zeros(0, 1, 4, 4)}, {}, "no training data"),
        ({"latents": torch.full((6, 1, 4, 4), math.nan)}, {}, "latents of example 0 are not finite"),
        ({"masks": [None] * 5}, {}, "5 masks for 6 latents"),
        ({"diffusion": FlowMatching()}, {"weighting": "min-snr"}, "defined for ε- and v-models"),
        ({"attachments": []}, {}, "nothing to train"),
        ({}, {"checkpointing": "full"}, "names no modules"),
        ({}, {"processes": 2}, r"1 process\(es\) take part in the training, expected 2"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_the_first_step(
    changes: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    toy = Toy(LoRAConfig(4), **changes)
    toy.on_call = lambda: pytest.fail("the model must not have run")
    with pytest.raises(SpectralAdapterError, match=message):
        train(toy.setup, TrainConfig(**config), "lora")


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"steps": 2.5}, {"accumulation": 0}, {"ema": 1.0}, {"optimiser": "adam"},
        {"betas": (1, 0)},
        {"precision": "int8"}, {"timesteps": "beta"}, {"weighting": "p2"}, {"explosion": -1},
        {"timestep_mean": "x"},
        {"checkpointing": "some"}, {"processes": -1}, {"steps": True},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpectralAdapterError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_settings_that_do_not_fit_together() -> None:
    with pytest.raises(SpectralAdapterError, match="replaces the schedule"):
        TrainConfig(optimiser="schedulefree", schedule="cosine")
    with pytest.raises(SpectralAdapterError, match="it averages already"):
        TrainConfig(optimiser="schedulefree", ema=0.9)
    with pytest.raises(SpectralAdapterError, match="defaults are AdamW's"):
        TrainConfig(optimiser="sgd")
    with pytest.raises(SpectralAdapterError, match=r"optimiser 'adam': did you mean 'adamw'"):
        TrainConfig(optimiser="adam")  # type: ignore[arg-type]
    config = TrainConfig(target_open=0.5, betas=(0.8, 0.9))
    assert TrainConfig(**config.as_dict()) == config


def test_optimisers_that_are_not_installed_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = optim.groups(Toy(LoRAConfig(2)).attachment.named_parameters(), (), TrainConfig(), "lora")
    for package in ("schedulefree", "prodigyopt", "bitsandbytes.optim"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.delattr(torch.optim, "Adafactor", raising=False)
    packages = (("schedulefree", "schedulefree"), ("prodigy", "prodigyopt"), ("adamw8bit", "bitsandbytes"))
    for name, package in packages:
        wanted = f"pip install {package}"
        with pytest.raises(SpectralAdapterError, match=wanted):
            optim.build(groups, TrainConfig(optimiser=name))
    with pytest.raises(SpectralAdapterError, match=r"torch .* has none"):
        optim.build(groups, TrainConfig(optimiser="adafactor"))
    assert set(optim.BUILDERS) == set(get_args(Optimiser))


def test_rates_of_the_groups() -> None:
    names = ["unet.a.up", "unet.a.gate.w1", "text_encoder.b.up", "text_encoder.b.gate.w1"]
    named = [(name, torch.nn.Parameter(torch.zeros(1))) for name in names]
    word = torch.nn.Parameter(torch.zeros(1))
    found = optim.groups(named, [word], TrainConfig(learning_rate=0.2, weight_decay=0.5), "lora")
    assert [(g.label, g.rate, g.weight_decay) for g in found] == [
        ("adapter", 0.2, 0.5),
        ("text encoder", 0.1, 0.5),
        ("words", 2.0, 0.0),
        ("gates", 12 / 500, 0.0),
        ("text encoder gates", 12 / 500, 0.0),
    ]
    chosen = TrainConfig(learning_rate=0.2, text_learning_rate=0.3, token_learning_rate=0.4)
    assert [g.rate for g in optim.groups(named, [word], chosen, "lora")] == [0.2, 0.3, 0.4, 0.024, 0.024]
    with pytest.raises(SpectralAdapterError, match="prodigy knows one learning rate"):
        optim.groups(named, [word], replace(chosen, optimiser="prodigy"), "lora")


def test_latents_and_conditioning_must_match() -> None:
    assert checks.matched(3, 1) == [0, 0, 0] and checks.matched(3, 3) == [0, 1, 2]
    for latents, conditionings in ((3, 2), (0, 1), (1, 0), (1, 3)):
        with pytest.raises(
            SpectralAdapterError, match=f"{latents} latents and {conditionings} conditionings"
        ):
            checks.matched(latents, conditionings)


def test_captions_that_are_missing_are_told() -> None:
    there, missing = Example(Path("a.png"), "x"), Example(Path("b.png"), "a picture of <x>", captioned=False)
    assert checks.caption_warnings([there]) == []
    assert checks.caption_warnings([there, missing])[0].startswith(
        "1 of 2 pictures have no caption file (b.png)"
    )


def test_ranks_above_a_layers_size() -> None:
    weights = {"u.big": torch.zeros(16, 32), "u.small": torch.zeros(4, 64)}
    assert checks.fitting(weights, LoRAConfig(4)) == (weights, [])
    kept, notes = checks.fitting(weights, FouRAConfig(8))
    assert kept == weights and "rank 8 is above the size of 1 layers, first u.small (4×64)" in notes[0]
    kept, notes = checks.fitting(weights, SpectralAConfig((8, 9)))
    assert list(kept) == ["u.big"] and "too small for column 9 and are left out" in notes[0]
    for config in (LoRAConfig(17), SpectralAConfig((16,))):
        with pytest.raises(SpectralAdapterError, match=r"every layer is smaller, first u\.big"):
            checks.fitting(weights, config)
