"""What the model draws otherwise stays: the loss, its prompts, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_core.methods import FouRAConfig, LoRAConfig, MethodConfig, SpectralAConfig
from spectral_core.statistics.prompts import PRESERVE
from spectral_core.training.config.adapter import ConceptSettings
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.folder import Example, Order
from spectral_core.training.engine.loop import train
from spectral_core.training.objectives.losses import batch_loss, draw_preserved
from spectral_core.training.objectives.preservation import Preserved, said_of, with_class
from spectral_core.training.runs.place import Run
from tests.core.training.training_toy import Toy

EVERYDAY, CLASSED = -1, -2
PRESERVED = Preserved([EVERYDAY], {0: CLASSED})
METHODS: list[MethodConfig] = [
    LoRAConfig(4),
    FouRAConfig(4, gate="adaptive"),
    SpectralAConfig((0, 1, 2, 3), train_scale=True),
]


class Told(Toy):
    """A toy that reads its captions: each moves the input by its own amount."""

    def __init__(self, method: MethodConfig, **changes: Any) -> None:
        self.said: list[tuple[int | None, ...]] = []
        super().__init__(method, **changes)

    def denoise(self, noisy: Tensor, timesteps: Tensor, captions: Sequence[int | None]) -> Tensor:
        self.said.append(tuple(captions))
        shift = torch.tensor([0.0 if c is None else float(c) for c in captions])
        return super().denoise(noisy + shift.reshape(-1, 1, 1, 1), timesteps, captions)


def settings(**changes: Any) -> TrainConfig:
    common: dict[str, Any] = {"steps": 12, "warmup": 0, "learning_rate": 1e-2, "seed": 5, "explosion": 0}
    return TrainConfig(**(common | changes))


def moved(toy: Toy, by: float = 0.1) -> Toy:
    """The toy with an adapter that does something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in toy.attachment.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return toy


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_off_is_the_model_alone_to_the_bit(method: MethodConfig) -> None:
    toy, x = moved(Toy(method)), torch.randn(3, 1, 4, 4)
    toy.attachment.set_strength(0.7)
    with_it = toy.model(x)
    with toy.attachment.off():
        assert torch.equal(toy.model(x), bare(toy, x))
    assert torch.equal(toy.model(x), with_it) and not torch.equal(with_it, bare(toy, x))


def bare(toy: Toy, x: Tensor) -> Tensor:
    hidden = torch.nn.functional.linear(x.flatten(1), toy.model.first.weight, toy.model.first.bias)
    out: Tensor = torch.nn.functional.linear(
        torch.tanh(hidden), toy.model.second.weight, toy.model.second.bias
    )
    return out.reshape(x.shape)


def test_the_loss_is_the_distance_from_the_model_alone() -> None:
    toy = moved(Told(LoRAConfig(4), preserved=PRESERVED))
    (batch,) = draw_preserved(toy.setup, settings(), 0)
    loss, power = batch_loss(toy.setup, batch, settings(weighting="min-snr"))
    latents = toy.setup.latents[list(batch.indices)]
    noisy = toy.setup.diffusion.add_noise(latents, batch.noise, batch.timesteps)
    shifted = noisy + torch.tensor([float(c) for c in batch.captions if c is not None]).reshape(-1, 1, 1, 1)
    wanted = bare(toy, shifted)
    rows = (toy.model(shifted) - wanted).square().flatten(1).mean(1)
    weights = toy.setup.diffusion.min_snr_weights(batch.timesteps, 5.0)
    assert torch.allclose(loss, (rows * weights).mean()) and torch.allclose(power, wanted.square().mean())
    assert set(batch.captions) <= {EVERYDAY, CLASSED} and loss.requires_grad


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_new_adapter_learns_nothing_from_it(method: MethodConfig) -> None:
    """At its start the adapter does nothing, so that there is nothing to keep."""
    toy = Told(method, preserved=PRESERVED)
    (batch,) = draw_preserved(toy.setup, settings(), 0)
    loss, _ = batch_loss(toy.setup, batch, settings())
    assert float(loss) < 1e-12


@pytest.mark.parametrize("changes", [{"preserve_every": 0}, {"preserve_weight": 0.0}])
def test_without_it_nothing_changes(changes: dict[str, Any]) -> None:
    plain, kept = Told(LoRAConfig(4)), Told(LoRAConfig(4), preserved=PRESERVED)
    first = train(plain.setup, settings(), "lora")
    second = train(kept.setup, settings(**changes), "lora")
    assert first.losses == second.losses and plain.digest == kept.digest


def test_every_nth_step_and_apart_from_the_loss() -> None:
    events: list[dict[str, Any]] = []
    toy = Told(LoRAConfig(4), preserved=PRESERVED)
    config = settings(preserve_every=3, preserve_weight=1000.0, accumulation=2)
    train(toy.setup, config, "lora", run=Run(listener=events.append))
    told = {e["step"]: e["preservation_loss"] for e in events if "preservation_loss" in e}
    assert list(told) == [1, 4, 7, 10] and told[1] < 1e-12 < told[4]
    assert max(e["loss"] for e in events if e["event"] == "step") < 100, "it is told by itself"
    asked = [said for said in toy.said if EVERYDAY in said or CLASSED in said]
    assert len(asked) == 8, "once without the adapter, once with it"


def test_it_keeps_the_model() -> None:
    x = torch.randn(64, 1, 4, 4)

    def drift(every: int) -> float:
        toy = Told(LoRAConfig(4), preserved=Preserved([EVERYDAY]))
        train(toy.setup, settings(steps=60, preserve_every=every, learning_rate=3e-2), "lora")
        return float((toy.model(x + EVERYDAY) - bare(toy, x + EVERYDAY)).square().mean())

    assert drift(1) < 0.6 * drift(0)


@pytest.mark.parametrize("stop", [4, 5, 8])
def test_resumed_it_draws_the_same(stop: int, tmp_path: Path) -> None:
    def toy() -> Told:
        return Told(FouRAConfig(4, gate="adaptive"), preserved=PRESERVED)

    def halt(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == stop:
            raise KeyboardInterrupt

    whole, last = toy(), toy()
    full = train(whole.setup, settings(), "foura")
    train(toy().setup, settings(), "foura", run=Run(tmp_path, listener=halt))
    assert train(last.setup, settings(), "foura", run=Run(tmp_path)).losses == full.losses
    assert last.digest == whole.digest


def test_batches_show_what_is_trained_on_in_one_shape() -> None:
    shown = [Example(Path(str(i)), "", 0 if i in (1, 4) else 2) for i in range(6)]
    latents = [torch.randn(1, 4, 4 if i < 3 else 8) for i in range(6)]
    toy = Toy(LoRAConfig(4))
    setup = replace(
        toy.setup, preserved=PRESERVED, latents=latents, order=Order(shown, 3, 0, [i < 3 for i in range(6)])
    )
    seen = set()
    for step in range(0, 80, 4):
        (batch,) = draw_preserved(setup, settings(), step, 2)
        assert len(batch.indices) == 6 and len({latents[i].shape for i in batch.indices}) == 1
        seen |= set(batch.indices)
    assert seen == {0, 2, 3, 5}, "neither prior nor held-out ones"
    assert draw_preserved(setup, settings(), 1) == []


@dataclass(frozen=True)
class Concept(ConceptSettings):
    pass


def test_what_is_said() -> None:
    captions = ["a <bot> on a chair", "the <BOT>, red", "no word here"]
    said = said_of(Concept(init_words="", class_words="robot"), "<bot>", captions)
    assert said.prompts == PRESERVE
    assert said.classed == {0: "a robot on a chair", 1: "the robot, red"}
    assert said_of(Concept(init_words="toy"), "<bot>", captions).classed[0] == "a toy on a chair"
    assert said_of(Concept(init_words=""), "<bot>", captions).classed == {}
    assert said_of(Concept(), "", captions).numbered(-1) == ({}, None), "nothing tells the concept apart"
    given = said_of(Concept(preserve_prompts="a dog | a Cat|a concat| "), "cat", captions)
    assert given.prompts == ("a dog", "a concat"), "not those that show it"
    assert with_class("bots and a bot", "bot", "toy") == "bots and a toy"
    texts, preserved = said.numbered(-3)
    assert preserved is not None and max(texts) == -3 and len(texts) == len(PRESERVE) + 2
    assert [texts[n] for n in preserved.prompts] == list(PRESERVE)
    assert texts[preserved.classed[1]] == "the robot, red"
