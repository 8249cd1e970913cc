"""Gates in training: their own rate, their share, no dead layer, frozen and trained on, both compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from spectral_core.fusion import freeze
from spectral_core.gates.formula import trained_tensor
from spectral_core.methods import FouRAConfig, LoRAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine import gates
from spectral_core.training.engine.checks import gate_warnings
from spectral_core.training.engine.gate_parameters import GateParameters
from spectral_core.training.engine.loop import evaluation_loss, train
from spectral_core.training.runs.outcome import GateReport
from spectral_core.training.runs.place import Run
from tests.core.training.training_toy import Toy

RANK = 8
TOY = 0.1  # of two layers with few rows; a model of many layers came within half of it


def toy(kind: str = "mlp", rank: int = RANK) -> Toy:
    return Toy(FouRAConfig(rank, gate="adaptive", gate_kind=kind), batch=6)


def parameters(made: Toy, ending: str) -> list[Any]:
    return [p for name, p in made.attachment.named_parameters() if name.endswith(ending)]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("rate", [1e-5, 1e-2])
@pytest.mark.parametrize("steps", [100, 200])
def test_the_share_is_reached_whatever_the_optimiser_its_rate_and_the_length(
    name: str, rate: float, steps: int
) -> None:
    made = toy(rank=16)
    options = TrainConfig(steps=steps, learning_rate=rate, optimiser=name)  # type: ignore[arg-type]
    result = train(made.setup, options, "foura")
    assert result.gates is not None and result.gates.share is not None
    assert result.gates.share == pytest.approx(0.5, abs=TOY), result.gates.share
    assert not result.gates.dead


@pytest.mark.parametrize("target", [0.3, 0.7])
@pytest.mark.parametrize("kind", ["mlp", "entropy"])
def test_other_targets_are_reached_too(target: float, kind: str) -> None:
    made = toy(kind, rank=16)
    result = train(made.setup, TrainConfig(steps=150, target_open=target, learning_rate=1e-3), "foura")
    assert result.gates is not None and result.gates.share == pytest.approx(target, abs=TOY)


def test_steering_is_its_formula_and_lifts_a_dead_layer() -> None:
    made = toy()
    decisions = GateParameters(made.attachment)
    first, second = parameters(made, "gate.bias")
    before = first.detach().clone(), second.detach().clone()
    decisions.steer(0.55, {"net.first": 0.25, "net.second": 7.0}, 0.5, 0.2, is_hard=True)
    assert torch.allclose(first, before[0] + 0.2 * (-0.4 + 0.75))
    assert torch.allclose(second, before[1] - 0.2 * 0.4)
    decisions.steer(0.9, {"net.first": 8.0, "net.second": 8.0}, 0.5, 0.2, is_hard=False)
    assert torch.allclose(second, before[1] - 0.2 * 0.4), "soft gates are not closed by steps"
    decisions.steer(0.9, {"net.first": 8.0, "net.second": 8.0}, 0.5, 0.2, is_hard=True)
    assert torch.allclose(second, before[1] - 0.2 * 1.4), "four tenths off is the whole rate"
    decisions.steer(0.5, {"net.first": 8.0, "net.second": 0.0}, 0.0, 0.2, is_hard=True)
    assert torch.allclose(second, before[1] - 0.2 * 0.4), "no target; and one gate is wanted everywhere"


def test_a_layer_whose_gates_all_closed_comes_back() -> None:
    made = toy()
    for parameter in parameters(made, "first.gate.bias"):
        parameter.data.fill_(-3.0)
    result = train(made.setup, TrainConfig(steps=100, learning_rate=1e-3), "foura")
    assert result.gates is not None and not result.gates.dead


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["mlp", "entropy"])
def test_frozen_gates_stay_while_the_adapter_trains_on(optimiser: Any, ema: float, kind: str) -> None:
    made = toy(kind)
    options = TrainConfig(
        steps=50, learning_rate=1e-2, freeze_gates=True, frozen_share=0.4, optimiser=optimiser, ema=ema
    )
    seen: dict[int, list[torch.Tensor]] = {}

    def listen(event: dict[str, Any]) -> None:
        if event["step"] in (31, 50):
            seen[event["step"]] = [p.detach().clone() for p in made.attachment.parameters()]

    result = train(made.setup, options, "foura", listen)
    names = [name for name, _ in made.attachment.named_parameters()]
    for name, early, late in zip(names, seen[31], seen[50], strict=True):
        assert torch.equal(early, late) == bool(trained_tensor(name)), name
    assert result.gates is not None and result.gates.loss == result.gates.loss_frozen
    assert 0 < result.gates.share < 1  # type: ignore[operator]
    adapter = made.attachment.to_adapter()
    for name, layer in freeze(adapter).layers.items():
        gate = adapter.layers[name].terms[0].params
        wanted = gate["gate.entropy_shift" if kind == "entropy" else "gate.bias"] > 0
        assert torch.equal(layer.terms[0].params["gate.mask"] > 0.5, wanted)


def test_the_plan_of_a_schedule() -> None:
    assert gates.plan(TrainConfig(steps=100), 0) == gates.Plan(70, 90, 100)
    assert gates.plan(TrainConfig(steps=100, freeze_gates=True), 0) == gates.Plan(70, 70, 80)
    assert gates.plan(TrainConfig(steps=300, freeze_gates=True, frozen_share=0.0), 200) == gates.Plan(
        270, 290, 300
    )
    assert gates.plan(TrainConfig(steps=1), 0) == gates.Plan(1, 0, 1)


def test_the_rate_of_the_gates() -> None:
    assert TrainConfig(steps=300).gate_rate() == 12 / 300 == TrainConfig(steps=500).gate_rate(200)
    assert TrainConfig(steps=3).gate_rate() == 0.3
    assert TrainConfig(learning_rate=3.0, gate_learning_rate=0.01).gate_rate() == 0.01
    rates: list[dict[str, float]] = []
    train(
        toy().setup,
        TrainConfig(steps=20, warmup=2, learning_rate=1e-4),
        "foura",
        run=Run(listener=lambda e: rates.append(e["learning_rates"]) if e["event"] == "step" else None),
    )
    assert [r["adapter"] for r in rates[2:]] == [1e-4] * 18
    wanted = [0.3 * 0.5 * (1 + math.cos(math.pi * k / 18)) for k in range(18)]
    assert [r["gates"] for r in rates[2:]] == pytest.approx(wanted)


def test_gates_that_cannot_close_are_told_of_before_training() -> None:
    assert gate_warnings(TrainConfig()) == gate_warnings(TrainConfig(steps=60)) == []
    (line,) = gate_warnings(TrainConfig(steps=500, gate_learning_rate=1e-4))
    assert "raise gate_learning_rate" in line and "logit of 2" in line
    (line,) = gate_warnings(TrainConfig(steps=3))
    assert "train for more steps" in line
    notes = train(Toy(LoRAConfig(4)).setup, TrainConfig(steps=3), "lora").notes
    assert not any("gate" in note for note in notes)


def test_the_comparison_is_the_loss_of_both_and_changes_nothing() -> None:
    made = toy()
    result = train(made.setup, TrainConfig(steps=150, batch_size=8, learning_rate=1e-2), "foura")
    found = result.gates
    assert found is not None and found.loss is not None and found.loss_frozen is not None
    adapter = made.attachment.to_adapter()
    with made.attachment.gates.inference():
        assert evaluation_loss(made.setup, levels=4) == pytest.approx(found.loss, rel=1e-5)
    made.attachment.remove()
    from spectral_core.attach.attaching import attach

    with attach(made.model, freeze(adapter), part="net"):
        assert evaluation_loss(made.setup, levels=4) == pytest.approx(found.loss_frozen, rel=1e-5)
    assert found.record() == {
        "gates_open": pytest.approx(found.share, abs=1e-6),
        "gates_loss": pytest.approx(found.loss, abs=1e-6),
        "gates_loss_frozen": pytest.approx(found.loss_frozen, abs=1e-6),
    }
    change = found.loss_frozen / found.loss - 1
    assert f"({change:+.1%})" in found.lines()[0] and found.lines()[0] in result.notes


@pytest.mark.parametrize(
    ("target", "words"), [(0.0, "give a target_open"), (0.5, "raise gate_learning_rate")]
)
def test_the_advice_knows_whether_there_is_a_target(target: float, words: str) -> None:
    report = GateReport({"a": (1.0,)}, always_open=("a",), target=target, share=1.0)
    assert words in report.warnings()[-1]
    assert len(report.warnings()) == (2 if target else 1)


@pytest.mark.parametrize(
    ("path", "name"),
    [("unet.a.gate.w1", "w1"), ("unet.mlp.gate.up", ""), ("unet.mlp.gate.gate.bias", "bias"), ("w1", "")],
)
def test_which_parameters_are_gates(path: str, name: str) -> None:
    assert trained_tensor(path) == name
