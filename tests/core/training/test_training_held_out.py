"""Held-out pictures judge a training and change nothing in it; the best state is kept, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_core.errors import SpectralAdapterError
from spectral_core.methods import FouRAConfig, LoRAConfig, MethodConfig, SpectralAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.folder import Example, Order
from spectral_core.training.data.held_out import held_out_of
from spectral_core.training.engine.loop import train
from spectral_core.training.objectives.losses import held_out_loss
from spectral_core.training.runs.outcome import TrainResult
from spectral_core.training.runs.place import Run
from tests.core.training.training_toy import Toy

HELD_OUT = (4, 5)


def settings(**changes: Any) -> TrainConfig:
    common: dict[str, Any] = {"steps": 24, "warmup": 0, "learning_rate": 1e-2, "seed": 5, "explosion": 0}
    return TrainConfig(**(common | {"validation_every": 4} | changes))


def toy(method: MethodConfig, held_out: tuple[int, ...] = HELD_OUT, **changes: Any) -> Toy:
    shown = [Example(Path(str(i)), "", 0 if i in HELD_OUT else 1) for i in range(6)]
    return Toy(method, held_out=held_out, order=Order(shown, 2, 0), **changes)


def run(method: MethodConfig, config: TrainConfig, **around: Any) -> tuple[Toy, TrainResult]:
    made = toy(method)
    return made, train(made.setup, config, method.method, run=Run(**around))


def stop_at(step: int) -> Any:
    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise KeyboardInterrupt

    return listen


@pytest.mark.parametrize("method", [LoRAConfig(4), FouRAConfig(4, gate="adaptive")], ids=str)
def test_judging_changes_no_bit_of_the_training(method: MethodConfig) -> None:
    config = settings(ema=0.9)
    plain = toy(method, held_out=())
    train(plain.setup, config, method.method)
    judged, result = run(method, config)
    assert judged.digest == plain.digest
    assert list(result.held_out) == [4, 8, 12, 16, 20, 24]


def test_the_loss_is_that_of_the_held_out_pictures_with_the_parameters_to_use() -> None:
    """EMA's average and hard gates; the same noise and levels in every check."""
    events: list[dict[str, Any]] = []
    config = settings(ema=0.9)
    made, result = run(FouRAConfig(4, gate="adaptive"), config, listener=events.append)
    told = {e["step"]: e["held_out_loss"] for e in events if "held_out_loss" in e}
    assert told == result.held_out
    with made.attachment.gates.inference():
        assert held_out_loss(made.setup, config) == result.held_out[24]
        others = replace(made.setup, held_out=(0, 1))
        assert held_out_loss(others, config) != result.held_out[24]


def test_masks_count_and_many_pictures_have_fewer_levels() -> None:
    config = settings()
    made = toy(LoRAConfig(4))
    half = torch.zeros(1, 4, 4)
    half[:, :, :2] = 1
    masked = replace(made.setup, masks=[None] * 4 + [half, half])
    assert held_out_loss(masked, config) != held_out_loss(made.setup, config)
    asked: list[float] = []
    denoise = made.setup.denoiser

    def counted(noisy: Any, timesteps: torch.Tensor, captions: Any) -> torch.Tensor:
        asked.extend(timesteps.tolist())
        return denoise(noisy, timesteps, captions)

    many = replace(made.setup, denoiser=counted, latents=torch.randn(40, 1, 4, 4), held_out=range(40))
    held_out_loss(many, config)
    assert len(asked) == 40 and len(set(asked)) == 8, "one level each, all of them seen"


@pytest.mark.parametrize("stop", [3, 4, 10, 17])
@pytest.mark.parametrize("patience", [0, 3])
def test_resumed_anywhere_it_judges_alike(stop: int, patience: int, tmp_path: Path) -> None:
    config = settings(patience=patience, learning_rate=0.3, ema=0.8)
    method = FouRAConfig(4, gate="adaptive")
    expected, full = run(method, config)
    _, first = run(method, config, folder=tmp_path, listener=stop_at(stop))
    assert first.best is None, "a stopped run goes on: nothing is offered yet"
    made, second = run(method, config, folder=tmp_path)
    assert second.held_out == full.held_out and made.digest == expected.digest
    assert (second.best is None) == (full.best is None)
    if second.best is not None and full.best is not None:
        with second.best.applied(), full.best.applied():
            assert made.digest == expected.digest


@pytest.mark.parametrize("method", [LoRAConfig(4), SpectralAConfig((0, 1, 2, 3))], ids=str)
def test_the_best_is_the_state_of_its_step(method: MethodConfig) -> None:
    config = settings(learning_rate=0.3, ema=0.5)
    made, result = run(method, config)
    last, best = made.digest, result.best
    assert best is not None and best.loss == min(result.held_out.values()) == result.held_out[best.step]
    shorter, _ = run(method, settings(learning_rate=0.3, ema=0.5, steps=best.step))
    with best.applied():
        assert made.digest == shorter.digest != last
    assert made.digest == last


def test_patience_ends_the_run_with_the_best() -> None:
    config = settings(learning_rate=0.3, patience=2, steps=200)
    made, result = run(LoRAConfig(4), config)
    assert len(result.losses) < 200 and not result.stopped and result.best is None
    best = min(result.held_out, key=lambda step: result.held_out[step])
    assert list(result.held_out)[-3] == best, "two checks after the best"
    shorter, _ = run(LoRAConfig(4), settings(learning_rate=0.3, steps=best))
    assert made.digest == shorter.digest
    assert f"the adapter is that of step {best}" in result.notes[-1]


def test_a_run_that_ended_early_stays_ended(tmp_path: Path) -> None:
    config = settings(learning_rate=0.3, patience=2, steps=200)
    made, first = run(LoRAConfig(4), config, folder=tmp_path)
    again, second = run(LoRAConfig(4), config, folder=tmp_path)
    assert second.losses == first.losses and again.digest == made.digest


def test_with_gates_to_be_fixed_only_fixed_ones_can_be_the_best() -> None:
    config = settings(freeze_gates=True, frozen_share=0.25, validation_every=2, learning_rate=0.3)
    _, result = run(FouRAConfig(4, gate="adaptive"), config)
    assert len(result.held_out) == 12
    assert result.best is None or result.best.step >= 18
    with pytest.raises(SpectralAdapterError, match="patience with freeze_gates"):
        settings(freeze_gates=True, patience=2)


def test_patience_without_pictures_is_said() -> None:
    made = toy(LoRAConfig(4), held_out=())
    notes = train(made.setup, settings(patience=3, steps=2), "lora").notes
    assert any("no picture is held out" in note for note in notes)


def test_the_share() -> None:
    assert held_out_of(10, 0) == () and len(held_out_of(10, 0.2)) == 2
    assert len(held_out_of(2, 0.99)) == len(held_out_of(100, 0.001)) == 1
    assert held_out_of(50, 0.2) == held_out_of(50, 0.2) != held_out_of(51, 0.2)
    with pytest.raises(SpectralAdapterError, match="expected at least two"):
        held_out_of(1, 0.5)
