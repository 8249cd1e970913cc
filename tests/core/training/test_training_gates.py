"""Gates in training: their own rate, their share, no dead layer, frozen and trained on, both compared."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from spectral_core.fusion import freeze
from spectral_core.gates.formula import trained_tensor
from spectral_core.gates.record import GateRecorder
from spectral_core.methods import FouRAConfig, LoRAConfig
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine import gates
from spectral_core.training.engine.checks import gate_warnings
from spectral_core.training.engine.gate_parameters import logit_above, loss_of_some
from spectral_core.training.engine.loop import evaluation_loss, train
from spectral_core.training.engine.stepper import Stepper
from spectral_core.training.engine.ungated import ungated_loss
from spectral_core.training.runs.distributed import world
from spectral_core.training.runs.outcome import MISSED, GateReport
from spectral_core.training.runs.place import Run
from tests.core.training.training_toy import Toy

RANK = 8


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
    assert result.gates.share == pytest.approx(0.5, abs=MISSED), result.gates.share
    assert made.attachment.gates.logits is None, "kept for the steps alone"


@pytest.mark.parametrize("target", [0.3, 0.7])
@pytest.mark.parametrize("kind", ["mlp", "entropy"])
def test_other_targets_are_reached_too(target: float, kind: str) -> None:
    made = toy(kind, rank=16)
    result = train(made.setup, TrainConfig(steps=150, target_open=target, learning_rate=1e-3), "foura")
    assert result.gates is not None and result.gates.share == pytest.approx(target, abs=MISSED)


def test_the_logit_that_a_share_is_above() -> None:
    logits = [torch.tensor([[3.0, 1.0], [-1.0, 2.0]]).flatten(), torch.tensor([0.0, -2.0])]
    assert logit_above(0.5, logits) == 0.5, "3, 2, 1 | 0, -1, -2"
    assert logit_above(1 / 6, logits) == 2.5 and logit_above(0.0, logits) == 2.5
    assert logit_above(1.0, logits) == -1.5
    forced = [torch.tensor([math.inf, math.inf, 1.0, -4.0])]
    assert logit_above(0.5, forced) == 1.0, "two are open in any case: the others close"
    assert logit_above(0.75, forced) == -1.5


def test_steering_moves_every_gate_alike_and_closes_hard_ones_only() -> None:
    made = toy()
    stepper = Stepper(made.setup, TrainConfig(steps=200), "foura", world(0))
    before = [p.detach().clone() for p in parameters(made, "gate.bias")]
    for logits, is_hard, way in (
        ([2.0, 1.0], False, 0.0),
        ([2.0, 1.0], True, -0.15),
        ([-2.0, -1.0], False, 0.0),
    ):
        made.attachment.gates.logits = [torch.tensor(logits)]
        stepper._steer(is_hard)
        for start, now in zip(before, parameters(made, "gate.bias"), strict=True):
            assert torch.allclose(now, start + way), "a tenth of the way to 1.5, and back"


def test_what_steering_goes_by_is_every_logit_of_a_step() -> None:
    made = toy()
    runtime = made.attachment.gates
    runtime.logits = []
    for parameter in parameters(made, "first.gate.bias"):
        parameter.data.copy_(-1.0 - torch.arange(RANK))
    evaluation_loss(made.setup, levels=1)
    first = runtime.logits[0].unflatten(0, (-1, RANK))
    assert first[:, 0].isinf().all() and torch.allclose(first[:, 1:], -1.0 - torch.arange(1.0, RANK))


def test_no_input_closes_a_whole_layer() -> None:
    made = toy()
    for parameter in parameters(made, "gate.bias"):
        parameter.data.copy_(-6.0 - torch.arange(RANK))
    made.attachment.gates.recorder = recorder = GateRecorder(bins=1)
    with made.attachment.gates.inference():
        evaluation_loss(made.setup, levels=2)
    assert recorder.summary()["mean_effective_rank"] == [1.0, 1.0]
    result = train(made.setup, TrainConfig(steps=100, learning_rate=1e-3), "foura")
    assert result.gates is not None and min(result.gates.frozen_rank.values()) >= 1


@pytest.mark.parametrize(("budget", "rows"), [(0.5, 4), (0.01, 1), (0.3, 2), (1.0, 8)])
@pytest.mark.parametrize("kind", ["mlp", "entropy"])
def test_a_budget_is_open_for_every_input(budget: float, rows: int, kind: str) -> None:
    made = Toy(FouRAConfig(RANK, gate="adaptive", gate_kind=kind, gate_budget=budget), batch=6)  # type: ignore[arg-type]
    made.attachment.gates.recorder = recorder = GateRecorder(bins=1)
    result = train(made.setup, TrainConfig(steps=60, learning_rate=1e-2), "foura")
    report = result.gates
    assert made.attachment.gates.logits is None
    assert report is not None and report.target == 0.0 and report.share is None, "another one counts"
    with made.attachment.gates.inference():
        evaluation_loss(made.setup, levels=4)
    seen = recorder.summary()
    assert seen["mean_effective_rank"] == [rows, rows] and set(seen["input_spread"][0]) == {0.0}
    assert set(report.frozen_rank.values()) == {rows}
    for layer in freeze(made.attachment.to_adapter()).layers.values():
        assert layer.terms[0].params["gate.mask"].sum() == rows


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
        "gates_effective_rank": pytest.approx(RANK * found.share, abs=1e-5),  # type: ignore[operator]
        "gates_loss": pytest.approx(found.loss, abs=1e-6),
        "gates_loss_frozen": pytest.approx(found.loss_frozen, abs=1e-6),
    }
    change = found.loss_frozen / found.loss - 1
    assert f"({change:+.1%})" in found.lines()[0] and found.lines()[0] in result.notes


def test_without_gates_at_the_same_rank_is_what_such_an_adapter_learns() -> None:
    """And the comparison changes nothing: the adapter, and what its gates did, are those without it."""
    options = TrainConfig(steps=80, batch_size=6, learning_rate=1e-2, ema=0.5)
    plain, made = toy(), toy()
    alone = train(plain.setup, options, "foura").gates
    found = train(made.setup, replace(options, compare_ungated=True), "foura").gates
    assert made.digest == plain.digest
    assert alone is not None and found is not None and found.loss_ungated is not None
    assert replace(found, loss_ungated=None) == alone
    assert found.record()["gates_loss_ungated"] == pytest.approx(found.loss_ungated, abs=1e-6)
    assert f"{found.loss_ungated:.4f} trained without gates at that rank" in found.lines()[0]


def test_its_loss_is_that_of_a_smaller_adapter_from_the_same_rows() -> None:
    made, options = toy(), TrainConfig(steps=60, batch_size=6, learning_rate=1e-2, gradient_clip=0.0)
    start = [p.detach().clone() for p in made.attachment.parameters()]
    ranks = {"net.first": 2.7, "net.second": 3.2}
    found = ungated_loss(made.setup, options, "foura", world(0), start, ranks, None)
    small = Toy(FouRAConfig(3, gate="none"), batch=6)
    for name, parameter in small.attachment.named_parameters():
        if name.endswith(".a"):
            parameter.data.copy_(dict(made.attachment.named_parameters())[name].data[:3])
    train(small.setup, options, "foura")
    assert found == pytest.approx(loss_of_some(small.setup, options), rel=2e-3)
    assert all(torch.equal(p, q) for p, q in zip(made.attachment.parameters(), start, strict=True))
    assert ungated_loss(made.setup, options, "foura", world(0), start, ranks, lambda: True) is None


@pytest.mark.parametrize(
    ("target", "words"), [(0.0, "give a target_open"), (0.5, "raise gate_learning_rate")]
)
def test_the_advice_knows_whether_there_is_a_target(target: float, words: str) -> None:
    report = GateReport({"a": (1.0,)}, {"a": 1}, always_open=("a",), target=target, share=1.0)
    assert words in report.warnings()[-1]
    assert len(report.warnings()) == (2 if target else 1)


@pytest.mark.parametrize(
    ("path", "name"),
    [("unet.a.gate.w1", "w1"), ("unet.mlp.gate.up", ""), ("unet.mlp.gate.gate.bias", "bias"), ("w1", "")],
)
def test_which_parameters_are_gates(path: str, name: str) -> None:
    assert trained_tensor(path) == name


def test_gates_that_are_all_alike_stay_finite() -> None:
    """Ties are open in any case, all of them: there is no logit to lead to 0."""
    toy = Toy(FouRAConfig(4, gate="adaptive"), batch=1)
    train(toy.setup, TrainConfig(steps=10, learning_rate=1e-9), "foura")
    assert all(bool(torch.isfinite(p).all()) for p in toy.attachment.parameters())
