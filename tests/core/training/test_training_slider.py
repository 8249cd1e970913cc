"""Sliders on a toy: both directions are learned from the frozen model itself, behind the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spectral_core.attach.attaching import attach
from spectral_core.errors import SpectralAdapterError
from spectral_core.methods import FouRAConfig, LoRAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.order import Order
from spectral_core.training.engine.loop import train
from spectral_core.training.objectives.diffusion import Diffusion, FlowMatching, Shares
from spectral_core.training.objectives.slider import SliderDenoiser, SliderNoise, examples, with_attribute
from tests.core.training.training_toy import CONFIGS, Toy

SHIFTS = {"neutral": 0.0, "plus": 0.4, "minus": -0.2}


class Sliding(Toy):
    """The toy with prompts: each adds a number to what the first layer sees."""

    def __init__(self, config, eta=1.0, start=0.0):
        super().__init__(config)
        self.shown = examples("neutral", "plus", "minus", (), 3)
        self.noise = SliderNoise(Diffusion(torch.linspace(0.99, 0.2, 50)), start)
        self.denoiser = SliderDenoiser(self.predict, [self.attachment], self.noise, self.shown, eta)

    def predict(self, noisy: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(noisy) == len(timesteps) == len(prompts)
        return self.model(noisy + torch.tensor([SHIFTS[p] for p in prompts])[:, None, None, None])


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda c: f"{c.method}")
def test_plus_and_minus_one_move_along_the_difference(config):
    toy = Sliding(config, eta=1.5)
    with torch.no_grad():
        x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(5))
        base = toy.predict(x, torch.zeros(8), ["neutral"] * 8)
        poles = [toy.predict(x, torch.zeros(8), [p] * 8) for p in ("plus", "minus")]
    wanted = 1.5 * (poles[0] - poles[1])
    setup = replace(
        toy.setup,
        denoiser=toy.denoiser,
        diffusion=toy.noise,
        latents=toy.setup.latents[:3].repeat_interleave(2, 0),
        order=Order(toy.shown, 4, 0),
    )
    options = TrainConfig(steps=150, learning_rate=2e-2, caption_dropout=0.0, target_open=0.0)
    result = train(setup, options, config.method)  # half of a rank of 4 would not do
    assert sum(result.losses[-10:]) < 0.5 * sum(result.losses[:10])
    adapter = toy.attachment.to_adapter()
    toy.attachment.remove()
    assert torch.equal(toy.predict(x, torch.zeros(8), ["neutral"] * 8), base)
    for strength in (1.0, -1.0):
        with attach(toy.model, adapter.scaled(strength), part="net"), torch.no_grad():
            moved = toy.predict(x, torch.zeros(8), ["neutral"] * 8) - base
        along = float((moved * wanted).sum() / wanted.square().sum())
        assert along == pytest.approx(strength, abs=0.5), (strength, along)


def test_what_is_missing_is_the_formula():
    toy = Sliding(LoRAConfig(4), eta=0.7)
    with torch.no_grad():
        for parameter in toy.attachment.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    x, t = torch.randn(4, 1, 4, 4), torch.tensor([3, 10, 20, 40])
    missing = toy.denoiser(x, t, [0, 1, 3, 2])
    for row, sign in enumerate((1, -1, -1, 1)):
        toy.attachment.set_strength(float(sign))
        adapted = toy.predict(x[row : row + 1], t[row : row + 1], ["neutral"])
        toy.attachment.set_strength(0.0)
        base, plus, minus = (toy.predict(x[row : row + 1], t[row : row + 1], [p]) for p in SHIFTS)
        assert torch.allclose(missing[row], (adapted - base - 0.7 * sign * (plus - minus))[0], atol=1e-6)
        toy.attachment.set_strength(1.0)
    assert missing.requires_grad
    with pytest.raises(SpectralAdapterError, match="caption_dropout"):
        toy.denoiser(x, t, [0, None, 1, 2])


def test_the_strength_is_one_again_after_an_error():
    toy = Sliding(FouRAConfig(4))
    with pytest.raises(KeyError):
        SliderDenoiser(toy.predict, [toy.attachment], toy.noise, examples("neutral", "plus", "none", (), 1))(
            torch.randn(1, 1, 4, 4), torch.tensor([3]), [0]
        )
    assert all(control.strength == 1.0 for control in toy.attachment._controls)


@pytest.mark.parametrize("inner", [Diffusion(torch.linspace(0.99, 0.2, 1000)), FlowMatching(shift=3.0)])
def test_no_level_before_the_start(inner):
    noise = SliderNoise(inner, 0.8)
    levels = noise.sample_timesteps(200, torch.Generator().manual_seed(0))
    assert float(noise.progress(levels).min()) >= 0.8 and len(levels.unique()) > 50
    assert float(noise.progress(noise.levels(5)).min()) >= 0.8
    x = torch.randn(2, 1, 4, 4)
    assert not noise.target(x, x, levels[:2]).any()
    assert torch.equal(noise.add_noise(x, x, levels[:2]), inner.add_noise(x, x, levels[:2]))
    with pytest.raises(SpectralAdapterError, match=r"start 0\.99"):
        SliderNoise(inner, 0.99).sample_timesteps(
            200, torch.Generator().manual_seed(0), Shares("logit-normal", 3.0, 0.1)
        )


def test_attributes():
    assert with_attribute("a {} on a table", "red cup") == "a red cup on a table"
    assert with_attribute("very old", "man") == "man very old" and with_attribute("a {}", "") == "a"
    found = examples("a {}", "an old {}", "a young {}", ("man", "woman"), 3)
    assert [e.positive for e in found[::2]] == ["an old man", "an old woman", "an old man"]
    assert [e.sign for e in found] == [1, -1] * 3 and found[2].neutral == found[3].neutral == "a woman"


@pytest.mark.parametrize("start", [0.0, 0.3, 0.9])
def test_fixed_levels_are_spread_over_what_lies_behind_the_start(start):
    noise = SliderNoise(Diffusion(torch.linspace(0.99, 0.2, 200)), start)
    progress = noise.progress(noise.levels(5))
    assert 2 <= len(progress) <= 5 and len(set(progress.tolist())) == len(progress)
    assert progress.min() >= start
    assert (progress.max() - progress.min()) >= 0.4 * (1 - start)
