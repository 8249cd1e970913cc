"""The loop on a plain module: it learns, leaves the model alone, stops cleanly; noise algebra; settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from spectral_core.attach import factors as folded
from spectral_core.errors import SpectralAdapterError
from spectral_core.methods import METHODS, FouRAConfig, LoRAConfig, MethodConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.gates import OpenGates
from spectral_core.training.engine.loop import Setup, evaluation_loss, train
from spectral_core.training.objectives.diffusion import Diffusion
from spectral_core.training.runs.place import Run
from tests.core.training.training_toy import CONFIGS, Denoiser, Toy


def set_up(config: MethodConfig) -> tuple[Denoiser, Any, Setup]:
    toy = Toy(config)
    return toy.model, toy.attachment, toy.setup


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_training_lowers_the_loss_and_leaves_the_model_bit_identical(config: MethodConfig) -> None:
    model, attachment, setup = set_up(config)
    before_state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 1, 4, 4)
    attachment.remove()
    before_output = model(x)
    model, attachment, setup = set_up(config)
    before = evaluation_loss(setup)
    events: list[dict[str, Any]] = []
    result = train(setup, TrainConfig(steps=60, learning_rate=2e-2, warmup=5), config.method, events.append)
    assert evaluation_loss(setup) < 0.97 * before
    assert (
        [e["step"] for e in events] == list(range(1, 61)) and len(result.losses) == 60 and not result.stopped
    )
    trained = attachment.to_adapter()
    assert all(
        t.abs().max() > 0
        for layer in trained.layers.values()
        for t in [layer.terms[0].factors(layer.shape).up]
    )
    attachment.remove()
    assert torch.equal(model(x), before_output)
    assert all(torch.equal(v, before_state[k]) for k, v in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_all_layers_are_folded_together(config: MethodConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per batch, and no layer by itself."""
    _, _, setup = set_up(config)
    folds: list[int] = []
    together = folded.fold_many
    monkeypatch.setattr(folded, "fold_many", lambda given: folds.append(len(given)) or together(given))
    monkeypatch.setattr(folded, "method_of", lambda _: pytest.fail("a layer was folded by itself"))
    train(setup, TrainConfig(steps=3, accumulation=2), config.method)
    compared = 2 if getattr(config, "gate", "") == "adaptive" else 0  # gates that decide, and frozen
    assert folds == [2] * (6 + compared)  # both layers, for each of the batches


def test_the_gates_of_a_trained_adapter_hold_their_mean_opening() -> None:
    _, attachment, setup = set_up(FouRAConfig(4, gate="adaptive"))
    train(setup, TrainConfig(steps=40, learning_rate=5e-2, target_open=0.25, gate_penalty=50.0), "foura")
    layers = attachment.to_adapter().layers.values()
    opened = torch.cat([layer.terms[0].params["gate.mean_open"] for layer in layers])
    assert ((opened > 0) & (opened < 1)).all(), (
        "E[p] must have been measured, not left at its start value of 1"
    )
    assert opened.mean() < 0.8, "a strong penalty towards a quarter open must close something from 0.88"


def test_open_gates_are_means_over_rows_and_passes() -> None:
    opened = OpenGates()
    opened.record("a", torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool(), None)
    opened.record("b", torch.tensor([[1, 1, 0]]).bool(), None)
    opened.record("a", torch.ones(1, 4).bool(), None)
    opened.record("c", torch.tensor([[0, 1, 0]]).bool(), 0.5)
    step = opened.step()
    assert step == {"a": (1.5 + 4) / 2, "b": 2.0, "c": 1.0} and list(step) == ["a", "b", "c"]
    assert opened.share(step) == pytest.approx((2.75 + 2 + 1) / 10)
    assert opened.step() == {}


def test_open_gates_are_told_by_noise_level_once() -> None:
    opened, halves = OpenGates(), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    opened.record("a", halves, torch.tensor([0.05, 0.95]))
    opened.record("b", torch.ones(2, 4).bool(), torch.tensor([0.05, 0.95]))
    opened.record("words", torch.zeros(2, 4).bool(), None)  # before the denoising
    opened.step(by_level=True)
    opened.record("a", halves, torch.tensor([0.0, 0.0]))
    opened.step()  # of a sample: it does not count
    assert opened.take_levels() == [0.75, *[None] * 8, 1.0]
    assert opened.take_levels() == [None] * 10


@pytest.mark.parametrize(("bias", "opened"), [(-6.0, 1.0), (6.0, 4.0)])
def test_gates_are_told_of_while_training_and_judged_at_the_end(bias: float, opened: float) -> None:
    """However far they are closed, every layer has one that is open."""
    _, attachment, setup = set_up(FouRAConfig(4, gate="adaptive"))
    for name, parameter in attachment.named_parameters():
        if name.endswith("gate.bias"):
            parameter.data.copy_(torch.full((4,), bias) + 0.1 * torch.arange(4))
    events: list[dict[str, Any]] = []
    config = TrainConfig(steps=20, target_open=0.0, gate_learning_rate=1e-3)
    result = train(setup, config, "foura", run=Run(listener=events.append))
    steps = [e for e in events if e["event"] == "step"]
    layers = ("net.first", "net.second")
    assert [e["step"] for e in steps if "open_by_layer" in e] == [10, 20]
    assert steps[9]["open_by_layer"] == dict.fromkeys(layers, opened / 4)
    assert {share for share in steps[9]["open_by_level"] if share is not None} == {opened / 4}
    assert all(e["open_share"] == opened / 4 for e in steps)
    assert [e["temperature"] for e in (steps[0], steps[7], steps[19])] == pytest.approx([1.0, 0.75, 0.5])
    assert result.gates is not None and result.gates.always_open == (layers if opened == 4 else ())
    assert [result.gates.frozen_rank[name] for name in layers] == [opened, opened]
    first, share, *last = result.notes
    assert "the gates cannot close" in first and "raise gate_learning_rate" in first
    assert share.startswith(
        f"gates: {opened / 4:.0%} open, effective rank {opened:.1f}; loss on training pictures"
    )
    assert len(last) == (opened == 4)
    for line in last:
        assert "2 of 2 layers keep every gate open" in line and "give a target_open" in line
    assert [e["event"] for e in events][-2 - len(last) :] == ["gates", *["warning"] * len(last), "finished"]


def test_training_works_inside_inference_mode() -> None:
    _, attachment, setup = set_up(LoRAConfig(4))
    expected = train(setup, TrainConfig(steps=4, ema=0.9), "lora").losses
    _, attachment, setup = set_up(LoRAConfig(4))
    with torch.inference_mode():
        setup = replace(setup, latents=setup.latents.clone())  # type: ignore[union-attr]
        assert train(setup, TrainConfig(steps=4, ema=0.9), "lora").losses == expected
    assert not any(p.is_inference() for p in attachment.parameters())


def test_same_seed_same_run_other_seed_other_run() -> None:
    def losses(seed: int) -> list[float]:
        _, _, setup = set_up(LoRAConfig(4))
        return train(setup, TrainConfig(steps=5, seed=seed), "lora").losses

    assert losses(3) == losses(3) != losses(4)


def test_an_interrupt_keeps_what_was_learned() -> None:
    _, attachment, setup = set_up(LoRAConfig(4))

    def stop(event: dict[str, Any]) -> None:
        if event["step"] == 7:
            raise KeyboardInterrupt

    result = train(setup, TrainConfig(steps=50, learning_rate=1e-2), "lora", stop)
    assert result.stopped and len(result.losses) == 7
    assert attachment.to_adapter().layers["net.first"].terms[0].params["up"].abs().max() > 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_algebra_recovers_the_latents(prediction: str) -> None:
    diffusion = Diffusion(torch.linspace(0.999, 0.01, 100), prediction)
    latents, noise = torch.randn(5, 4, 3, 3).double(), torch.randn(5, 4, 3, 3).double()
    t = torch.tensor([0, 10, 50, 98, 99])
    noisy, target = diffusion.add_noise(latents, noise, t), diffusion.target(latents, noise, t)
    alpha = diffusion.alphas_cumprod[t].double().reshape(-1, 1, 1, 1)
    if prediction == "epsilon":
        recovered = (noisy - (1 - alpha).sqrt() * target) / alpha.sqrt()
    else:
        recovered = alpha.sqrt() * noisy - (1 - alpha).sqrt() * target
    assert torch.allclose(recovered, latents, atol=1e-5)
    assert diffusion.progress(t).tolist() == pytest.approx([1, 1 - 10 / 99, 1 - 50 / 99, 1 / 99, 0], abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"batch_size": 0}, {"learning_rate": -1.0}, {"learning_rate": math.nan}, {"warmup": -1},
        {"caption_dropout": 1.0}, {"target_open": -0.1}, {"schedule": "steps"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpectralAdapterError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_rate_schedule() -> None:
    cosine = TrainConfig(steps=110, warmup=10, schedule="cosine")
    assert [cosine.rate_factor(s) for s in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert cosine.rate_factor(109) < 0.001 < TrainConfig(steps=110, schedule="linear").rate_factor(109) < 0.02
    assert TrainConfig(warmup=0).rate_factor(0) == TrainConfig().rate_factor(400) == 1.0
    rates = {"foura": 1e-4, "lora": 1e-4, "orthogonal": 1e-4, "spectral_a": 1e-3, "spectral_r": 1e-2}
    assert {method: TrainConfig().rate_for(method) for method in METHODS} == rates
    assert TrainConfig(learning_rate=0.5).rate_for("lora") == 0.5
