"""The student's target, its examples, its start and its rate, against the formulas on a small model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_core.adapter.adapter import Adapter, AdapterLayer, Term
from spectral_core.adapter.schedule import Schedule
from spectral_core.attach.attaching import Attachment, attach
from spectral_core.errors import SpectralAdapterError
from spectral_core.fusion import fuse
from spectral_core.maths.layers import LayerShape
from spectral_core.maths.lowrank import delta
from spectral_core.methods import LoRAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.order import Order
from spectral_core.training.engine.loop import Setup, train
from spectral_core.training.objectives.diffusion import Diffusion
from spectral_core.training.objectives.distillation import (
    BASE,
    RATE,
    DistilDenoiser,
    DistilExample,
    default_rate,
    examples,
    settled,
    student_of,
)
from spectral_core.training.objectives.losses import Batch, batch_loss
from spectral_core.training.objectives.towards_prediction import ResidualNoise
from tests.core.fusion.fusion_cases import GATED, adapter, concepts

WIDTH = 4


class Model(nn.Module):
    """Two layers on latents (B, 1, 1, 4); a prompt's number is added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x + words[:, None, None, None])))


def lora(seed: int, **more: Any) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def layer() -> AdapterLayer:
        params = {
            "down": torch.randn(2, WIDTH, generator=generator) / 2,
            "up": torch.randn(WIDTH, 2, generator=generator) / 2,
        }
        return AdapterLayer(LayerShape(WIDTH, WIDTH), (Term(LoRAConfig(2), params),))

    return replace(Adapter({f"unet.{name}": layer() for name in ("one", "two")}), **more)


def noise() -> ResidualNoise:
    return ResidualNoise(Diffusion(torch.linspace(0.99, 0.01, 50)))


def case(adapters: list[Adapter], student: Adapter, shown: list[DistilExample]) -> tuple[Any, ...]:
    model = Model().requires_grad_(False)
    words = {example.prompt: float(len(example.prompt)) for example in shown}
    asked: list[bool] = []

    def predict(noisy: Tensor, timesteps: Tensor, rows: Any, as_teacher: bool) -> Tensor:
        asked.append(as_teacher)
        told = torch.tensor([words[shown[i].prompt] for i in rows]) + 0.1 * as_teacher
        return model(noisy, told)

    teachers = [[attach(model, a, part="unet")] for a in adapters]
    learner = attach(model, student, part="unet", trainable=True)
    return model, DistilDenoiser(predict, [learner], teachers, noise(), shown), learner, teachers, words


def test_the_answer_is_what_the_student_misses_of_each_rows_own_teacher() -> None:
    shown = [DistilExample(0, "a"), DistilExample(1, "bb"), DistilExample(BASE, "ccc")]
    taught = [lora(1), lora(2, strength=-0.5)]
    model, denoiser, _, _, words = case(taught, lora(3), shown)
    x = torch.randn(4, 1, 1, WIDTH)
    rows, levels = [1, 0, 2, 1], torch.tensor([3, 9, 20, 40])
    found = denoiser(x, levels, rows)
    bare = Model()
    for place, row in enumerate(rows):
        told = torch.tensor([words[shown[row].prompt]])
        concept = shown[row].concept
        with torch.no_grad():
            if concept == BASE:
                wanted = bare(x[[place]], told + 0.1)
            else:
                with attach(bare, taught[concept], part="unet"):
                    wanted = bare(x[[place]], told + 0.1)
            with attach(bare, lora(3), part="unet"):
                student = bare(x[[place]], told)
        assert torch.allclose(found[place], (student - wanted)[0], atol=1e-6)
    with torch.no_grad(), attach(bare, lora(3), part="unet"):
        told = torch.tensor([1.0])
        assert torch.allclose(model(x[:1], told), bare(x[:1], told), atol=1e-6), "the student alone acts"
    with pytest.raises(SpectralAdapterError, match="caption_dropout"):
        denoiser(x, levels, [0, None, 1, 2])


def test_what_predicting_nothing_costs_is_the_models_own_target() -> None:
    """A residual's target is 0; a student that is nearly right loses next to nothing at one noise level and a
    hundred times that at another, which is no explosion."""
    _, denoiser, learner, _, _ = case([lora(1)], lora(1), [DistilExample(0, "a")])
    latents, drawn = torch.zeros(1, 1, 1, WIDTH), torch.randn(1, 1, 1, WIDTH)
    setup = Setup(
        denoiser=denoiser, latents=latents, order=Order([DistilExample(0, "a")], 1, 0), diffusion=noise(),
        attachments=[learner],
    )  # fmt: skip
    loss, power = batch_loss(setup, Batch((0,), (0,), torch.tensor([9]), drawn))
    assert power == drawn.square().mean() and loss < power / 2


def test_after_an_error_the_student_alone_acts() -> None:
    shown = [DistilExample(0, "a")]
    model, denoiser, learner, teachers, _ = case([lora(1)], lora(3), shown)

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("out of memory")

    broken = replace(denoiser, predict=fail)
    x, told = torch.randn(1, 1, 1, WIDTH), torch.tensor([1.0])
    with pytest.raises(RuntimeError, match="out of memory"):
        broken(x, torch.tensor([3]), [0])
    teachers[0][0].remove()
    with torch.no_grad():
        alone = model(x, told)
        learner.remove()
        bare = model(x, told)
        with attach(model, lora(3), part="unet"):
            assert torch.allclose(alone, model(x, told), atol=1e-6)
    assert not torch.allclose(alone, bare)


def test_schedules_of_teachers_are_followed() -> None:
    """A teacher that acts in the second half of the denoising only is the model alone before."""
    shown = [DistilExample(0, "a")]
    scheduled = lora(1, schedule=Schedule.window(0.5, 1.0))
    _, denoiser, *_ = case([scheduled], lora(3), shown)
    _, always, *_ = case([lora(1)], lora(3), shown)
    _, never, *_ = case([lora(1, strength=1e-9)], lora(3), shown)
    x = torch.randn(1, 1, 1, WIDTH)
    noisy, clean = torch.tensor([49]), torch.tensor([0])
    assert torch.allclose(denoiser(x, noisy, [0]), never(x, noisy, [0]), atol=1e-6)
    assert torch.allclose(denoiser(x, clean, [0]), always(x, clean, [0]), atol=1e-6)
    _, late, *_ = case([lora(1)], lora(3, schedule=Schedule.window(0.5, 1.0)), shown)
    _, none, *_ = case([lora(1)], lora(3, strength=1e-9), shown)
    assert torch.allclose(late(x, clean, [0]), always(x, clean, [0]), atol=1e-6), "the student's, too"
    assert torch.allclose(late(x, noisy, [0]), none(x, noisy, [0]), atol=1e-6)


def test_a_scheduled_teacher_that_is_off_asks_for_no_progress() -> None:
    """Its rows may be in no batch yet, or were more in the last one."""
    shown = [DistilExample(0, "a"), DistilExample(1, "bb")]
    taught = [lora(1, schedule=Schedule.window(0.5, 1.0)), lora(2)]
    _, denoiser, *_ = case(taught, lora(3), shown)
    _, plain, *_ = case([lora(1), lora(2)], lora(3), shown)
    x, levels = torch.randn(3, 1, 1, WIDTH), torch.tensor([3, 40, 20])
    assert torch.allclose(denoiser(x[:2], levels[:2], [1, 1]), plain(x[:2], levels[:2], [1, 1]))
    denoiser(x, levels, [0, 0, 1])
    assert torch.allclose(denoiser(x[:1], levels[:1], [1]), plain(x[:1], levels[:1], [1]))


def test_training_brings_the_student_to_its_teachers() -> None:
    shown = [DistilExample(0, "a"), DistilExample(1, "b" * 6), DistilExample(BASE, "c" * 12)]
    taught = [lora(1), lora(2)]
    student = student_of(fuse(taught, "average").adapter)
    _, denoiser, learner, _, _ = case(taught, student, shown)
    latents = list(torch.randn(3, 1, 1, WIDTH, generator=torch.Generator().manual_seed(5)))
    setup = Setup(denoiser, latents, Order(shown, 6, 0), denoiser.noise, [learner])
    config = TrainConfig(steps=120, batch_size=6, learning_rate=0.02, caption_dropout=0.0, warmup=5)
    losses = train(setup, config, "lora").losses
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20]), (losses[:20], losses[-20:])


def test_examples_show_prompts_in_turn_and_some_without() -> None:
    found, places = examples([("a", "b"), ("c",)], ("x", ""), 3, 0.25)
    assert [e for e in found if e.repeats == 3] == [
        *(DistilExample(0, p, 3) for p in "aba"),
        *(DistilExample(1, "c", 3) for _ in range(3)),
        *(DistilExample(BASE, p, 3) for p in ("x", "", "x")),
    ]
    empty = [e for e in found if e.repeats == 1]
    assert len(empty) == 9 and {e.prompt for e in empty} == {""}
    assert places == [n for n in range(9) for _ in range(2)]
    assert examples([("a",)], (), 2, 0.0) == ([DistilExample(0, "a")] * 2, [0, 1])
    with pytest.raises(SpectralAdapterError, match="caption_dropout"):
        examples([("a",)], (), 2, 1.0)


def test_the_student_is_the_fused_adapter_in_even_factors() -> None:
    given = [replace(a, strength=0.7) for a in concepts()]
    fused = fuse(given, "sum").adapter.scaled(-1.5).with_layer_strength("unet.a", 0.5)
    student = student_of(fused)
    assert student.strength == 1 and not student.layer_strengths
    assert student.provenance == fused.provenance and student.layers.keys() == fused.layers.keys()
    for name, layer in fused.layers.items():
        expected = delta(layer.factors(fused.strength_of(name)))
        (term,) = student.layers[name].terms
        factors = student.layers[name].factors()
        assert torch.allclose(delta(factors), expected.to(factors.up.dtype), atol=1e-5)
        sizes = [
            torch.linalg.vector_norm(term.params[k].flatten(1), dim=d) for k, d in (("down", 1), ("up", 0))
        ]
        assert torch.allclose(*sizes, rtol=1e-4)
    with pytest.raises(SpectralAdapterError, match=r"unet\.\w has an adaptive gate"):
        student_of(adapter(GATED, 3))


def test_the_default_rate_follows_the_size_of_the_parameters() -> None:
    student = student_of(lora(1))
    values = torch.cat(
        [v.flatten() for layer in student.layers.values() for t in layer.terms for v in t.params.values()]
    )
    assert default_rate(student, ["unet"]) == pytest.approx(RATE * float(values.square().mean().sqrt()))
    assert default_rate(student_of(lora(1).scaled(4.0)), ["unet"]) == pytest.approx(
        2 * default_rate(student, ["unet"])
    )
    assert default_rate(student, ["text_encoder"]) == 1e-4


def test_settings_get_a_rate_where_none_is_given_but_prodigys() -> None:
    student = student_of(lora(1))
    found = settled(TrainConfig(caption_dropout=0.1), student, ["unet"])
    assert found.learning_rate == default_rate(student, ["unet"]) and found.caption_dropout == 0
    assert settled(TrainConfig(learning_rate=0.5), student, ["unet"]).learning_rate == 0.5
    alone = settled(TrainConfig(optimiser="prodigy"), student, ["unet"])
    assert alone.rate_for("lora") == TrainConfig(optimiser="prodigy").rate_for("lora")


def test_attachment_strengths_are_restored() -> None:
    """What is attached besides keeps its strength: only student and teachers are switched."""
    shown = [DistilExample(0, "a")]
    model, denoiser, *_ = case([lora(1)], lora(3), shown)
    with attach(model, lora(9), part="unet") as other:
        assert isinstance(other, Attachment)
        x, level = torch.randn(1, 1, 1, WIDTH), torch.tensor([3])
        with_other = denoiser(x, level, [0])
    assert not torch.allclose(with_other, denoiser(x, level, [0]))
