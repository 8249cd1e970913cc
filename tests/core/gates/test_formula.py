"""The adaptive gate: its formula, modes and gradients, what its run-time state learns, the recorder."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from spectral_core.errors import SpectralAdapterError
from spectral_core.gates import formula as gate
from spectral_core.gates import runtime as gate_runtime
from spectral_core.gates.formula import GateRecorder, GateRuntime
from tests.core.gates.gated import apply

RANK = 6
every_kind = pytest.mark.parametrize("kind", gate.KINDS)
every_pairing = pytest.mark.parametrize("rows", [1, 2])


def params(kind: str, rank: int = RANK, seed: int = 0) -> dict[str, Tensor]:
    """A gate moved off its start: different logits for different inputs, some of them negative."""
    draw = torch.Generator().manual_seed(seed)
    found = gate.init(rank, kind, draw)
    for name in gate.trainable(kind):
        found[name] = found[name] + 0.8 * torch.randn(found[name].shape, generator=draw)
    found["gate.bias"] = 1.5 * torch.randn(rank, generator=draw)
    if kind == "entropy":
        found["gate.entropy_shift"] -= 2.5
    found["gate.mu"] = torch.tensor(-0.3)
    return found


def activations(*shape: int, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(shape[0], *(1,) * (len(shape) - 1), generator=draw))
    return torch.randn(shape, generator=draw) * scale


def energy_by_loops(z: Tensor, rows: int) -> Tensor:
    """mean over tokens |z|², z (B, tokens, R)."""
    out = torch.zeros(z.shape[0], z.shape[2] // rows, dtype=torch.float64)
    for b in range(z.shape[0]):
        for i in range(out.shape[1]):
            values = [
                float(z[b, t, i + part * out.shape[1]]) ** 2
                for t in range(z.shape[1])
                for part in range(rows)
            ]
            out[b, i] = sum(values) / z.shape[1]
    return out


def logits_by_definition(p: dict[str, Tensor], phi: Tensor, kind: str) -> Tensor:
    p = {k: v.double() for k, v in p.items()}
    out = []
    for row in phi.double():
        normed = (row - row.mean()) / torch.sqrt(row.var(unbiased=False) + 1e-5)
        seen = torch.cat([normed, (row.mean() - p["gate.mu"])[None]])
        hidden = p["gate.w1"] @ seen + p["gate.b1"]
        value = p["gate.bias"] + p["gate.w2"] @ (hidden * torch.sigmoid(hidden))
        if kind == "entropy":
            q = torch.sigmoid(value)
            entropy = -(q * torch.log(q) + (1 - q) * torch.log(1 - q))
            value = p["gate.entropy_scale"] * entropy + p["gate.entropy_shift"]
        out.append(value)
    return torch.stack(out)


# --- the formula ----------------------------------------------------------------------------------


@every_pairing
def test_features(rows: int) -> None:
    z = activations(3, 5, RANK * rows)
    wanted = torch.log(energy_by_loops(z, rows) + 1e-12)
    assert torch.allclose(gate.features(z, rows, False).double(), wanted, atol=1e-5)
    as_image = z.mT.reshape(3, RANK * rows, 5, 1)
    assert torch.allclose(gate.features(as_image, rows, True).double(), wanted, atol=1e-5)
    as_grid = z.reshape(3, 5, 1, RANK * rows)
    assert torch.allclose(gate.features(as_grid, rows, False).double(), wanted, atol=1e-5)
    each = gate.features(z[:, 0], rows, False)  # 2-D: every row is a batch row
    assert torch.allclose(each.double(), torch.log(energy_by_loops(z[:, :1], rows) + 1e-12), atol=1e-5)
    assert torch.allclose(
        gate.features(torch.zeros(1, 2, RANK * rows), rows, False), torch.tensor(math.log(1e-12))
    )


def test_features_of_half_precision_are_squared_in_float32() -> None:
    z = torch.full((1, 4, RANK), 3e4, dtype=torch.float16)  # its square is beyond float16
    assert torch.allclose(gate.features(z, 1, False), torch.tensor(2 * math.log(3e4)), rtol=1e-3)
    tiny = torch.full((1, 4, RANK), 1e-5, dtype=torch.bfloat16)
    assert torch.allclose(gate.features(tiny, 1, False), torch.tensor(2 * math.log(1e-5)), rtol=1e-2)


@every_kind
def test_logits(kind: str) -> None:
    p = params(kind)
    phi = gate.features(activations(7, 5, RANK), 1, False)
    wanted = logits_by_definition(p, phi, kind)
    found = gate.logits(p, phi, kind)
    assert torch.allclose(found.double(), wanted, atol=1e-4)
    assert (found > 0).any() and (found < 0).any(), "a case where nothing gates shows nothing"
    assert torch.allclose(
        gate.probabilities(gate.logits(p, phi, kind), 0.5).double(), torch.sigmoid(wanted / 0.5), atol=1e-4
    )


@every_kind
def test_starts_open_for_any_input(kind: str) -> None:
    p = gate.init(RANK, kind, torch.Generator().manual_seed(3))
    assert {k: tuple(v.shape) for k, v in p.items()} == gate.tensor_shapes(RANK, kind)
    assert set(gate.trainable(kind)) < set(p)
    for z in (activations(4, 5, RANK), torch.zeros(4, 5, RANK), 1e4 * activations(4, 5, RANK)):
        logits = gate.logits(p, gate.features(z, 1, False), kind)
        assert torch.allclose(logits, torch.full_like(logits, 2.0), atol=2e-3)
        assert torch.equal(apply(z, p, kind, 1, False, GateRuntime(), "layer"), z)
    assert p["gate.w1"].abs().max() > 0


@every_kind
def test_extreme_logits_stay_finite(kind: str) -> None:
    p = params(kind)
    p["gate.bias"] = torch.tensor([-1e4, -200.0, -30.0, 30.0, 200.0, 1e4])
    p = {k: v.requires_grad_(k in gate.trainable(kind)) for k, v in p.items()}
    z = activations(3, 5, RANK)
    out = apply(z, p, kind, 1, False, GateRuntime("soft", 0.5), "layer")
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p[n].grad).all() for n in gate.trainable(kind))  # type: ignore[arg-type]


# --- applying it ----------------------------------------------------------------------------------


@every_kind
@every_pairing
@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_apply(kind: str, rows: int, mode: str) -> None:
    p, z = params(kind), activations(9, 5, RANK * rows)
    logits = gate.logits(p, gate.features(z, rows, False), kind)
    values = torch.sigmoid(logits / 0.7) if mode == "soft" else (logits > 0).float()
    wanted = z * values.repeat(1, rows)[:, None]
    found = apply(z, p, kind, rows, False, GateRuntime(mode, 0.7), "layer")
    assert torch.allclose(found, wanted, atol=1e-6)
    image = z.mT[..., None]
    found = apply(image, p, kind, rows, True, GateRuntime(mode, 0.7), "layer")
    assert torch.allclose(found, wanted.mT[..., None], atol=1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        half = apply(z.to(dtype), p, kind, rows, False, GateRuntime(mode, 0.7), "layer")
        assert half.dtype == dtype


@every_kind
def test_rows_of_a_batch_gate_themselves(kind: str) -> None:
    p, z = params(kind), activations(4, 5, RANK)
    runtime = GateRuntime()
    together = apply(z, p, kind, 1, False, runtime, "layer")
    disturbed = z.clone()
    disturbed[1:] = 100 * disturbed[1:] + 3
    assert torch.equal(apply(disturbed, p, kind, 1, False, runtime, "layer")[0], together[0])
    alone = torch.cat([apply(row[None], p, kind, 1, False, runtime, "layer") for row in z])
    assert torch.allclose(alone, together)


def test_autocast_does_not_reach_the_gate() -> None:
    p, phi = params("mlp"), gate.features(activations(5, 5, RANK), 1, False)
    exact = gate.logits(p, phi, "mlp")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate.logits(p, phi, "mlp"), exact)


@every_kind
def test_gradient_of_soft_and_straight_through(kind: str) -> None:
    """Soft: the true gradient (numerically). Straight-through: its forward is 0/1, its gradient that of p."""
    p = {k: v.double() for k, v in params(kind).items()}
    names = gate.trainable(kind)
    z = activations(3, 4, RANK).double().requires_grad_()
    leaves = [p[n].requires_grad_() for n in names]
    runtime = GateRuntime("soft", 0.8)

    def soft(z_: Tensor, *values: Tensor) -> Tensor:
        return apply(z_, p | dict(zip(names, values, strict=True)), kind, 1, False, runtime, "layer")

    assert torch.autograd.gradcheck(soft, (z, *leaves), atol=1e-5)
    runtime.set_mode("straight_through", 0.8)
    out = soft(z, *leaves)
    found = torch.autograd.grad(out.sum(), leaves)
    p_soft = gate.probabilities(gate.logits(p, gate.features(z, 1, False), kind), 0.8)
    wanted = torch.autograd.grad((z.detach() * p_soft[:, None]).sum(), leaves)
    assert all(torch.allclose(f, w) and f.any() for f, w in zip(found, wanted, strict=True))
    hard = apply(z, p, kind, 1, False, GateRuntime(), "layer")
    assert torch.allclose(out, hard)


# --- the run-time state ---------------------------------------------------------------------------


def test_schedule() -> None:
    assert [gate.temperature_at(f) for f in (0.0, 0.35, 0.7, 1.0, -1.0, 2.0)] == [
        1.0,
        0.75,
        0.5,
        0.5,
        1.0,
        0.5,
    ]
    assert [gate.mode_at(f) for f in (0.0, 0.69, 0.7, 1.0)] == ["soft"] * 2 + ["straight_through"] * 2
    runtime = GateRuntime()
    runtime.anneal(0.35)
    assert (runtime.mode, runtime.temperature) == ("soft", 0.75)
    with pytest.raises(RuntimeError), runtime.inference():
        assert runtime.mode == "hard"
        raise RuntimeError
    assert (runtime.mode, runtime.temperature) == ("soft", 0.75)


def test_level_is_the_mean_over_the_first_steps_and_then_stays() -> None:
    p = params("mlp")
    runtime = GateRuntime("soft", 1.0, settle_steps=3)
    levels = []
    for step in range(5):
        batches = [activations(2, 5, RANK, seed=10 * step + i) for i in range(2)]  # an accumulated step
        for z in batches:
            apply(z, p, "mlp", 1, False, runtime, "layer")
        runtime.end_step()
        levels.append(float(torch.cat([gate.features(z, 1, False) for z in batches]).mean()))
    learned = runtime.buffers()["layer"]["gate.mu"]
    assert float(learned) == pytest.approx(sum(levels[:3]) / 3, abs=1e-5)
    # ... and the gate uses it from then on, in place of the stored one
    z = activations(4, 5, RANK)
    with runtime.inference():
        found = apply(z, p, "mlp", 1, False, runtime, "layer")
    assert torch.equal(found, apply(z, p | {"gate.mu": learned}, "mlp", 1, False, GateRuntime(), "layer"))
    runtime.set_mode("soft", 1.0)
    apply(z, p, "mlp", 1, False, runtime, "layer")
    runtime.end_step()
    assert torch.equal(runtime.buffers()["layer"]["gate.mu"], learned)


def test_inference_and_settled_adapters_learn_no_level() -> None:
    for runtime in (GateRuntime(), GateRuntime("soft", 1.0, settle_steps=0)):
        apply(activations(2, 5, RANK), params("mlp"), "mlp", 1, False, runtime, "layer")
        runtime.end_step()
        assert runtime.buffers() == {}


@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_calibration_is_the_mean_opening(mode: str) -> None:
    p, runtime = params("mlp"), GateRuntime(mode, 0.5, settle_steps=0)
    assert runtime.mean_open("layer") is None
    runtime.start_calibration()
    batches = [activations(n, 5, RANK, seed=n) for n in (1, 4, 3)]
    for z in batches:
        apply(z, p, "mlp", 1, False, runtime, "layer")
    every = torch.cat(
        [gate.probabilities(gate.logits(p, gate.features(z, 1, False), "mlp"), 0.5) for z in batches]
    )
    assert torch.allclose(runtime.mean_open("layer"), every.mean(0), atol=1e-6)  # type: ignore[arg-type]
    assert torch.equal(runtime.buffers()["layer"]["gate.mean_open"], runtime.mean_open("layer"))  # type: ignore[arg-type]
    runtime.start_calibration()
    assert runtime.mean_open("layer") is None


@pytest.mark.parametrize("every", [1, 3, 8192])
def test_many_layers_are_counted_each_for_itself(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of two ranks, batches of two sizes, however many are counted at once; what is undone is not."""
    monkeypatch.setattr(gate_runtime, "_COUNT_EVERY", every)
    together = GateRuntime("soft", 0.7)
    together.start_calibration()
    for i in range(5):
        rank = RANK if i % 2 else 4
        p, alone = params("mlp", rank, seed=i), GateRuntime("soft", 0.7)
        alone.start_calibration()
        for batch in (1, 3, 1):
            z = activations(batch, 5, rank, seed=7 * i + batch)
            for runtime in (together, alone):
                apply(z, p, "mlp", 1, False, runtime, f"layer {i}")
        alone.end_step()
        wanted = alone.buffers()[f"layer {i}"]
        state = together.state()
        apply(activations(2, 5, rank), p, "mlp", 1, False, together, f"layer {i}")
        together.restore(state)
        assert torch.allclose(together.mean_open(f"layer {i}"), wanted["gate.mean_open"], atol=1e-6)  # type: ignore[arg-type]
    together.end_step()
    assert torch.allclose(together.buffers()["layer 4"]["gate.mu"], wanted["gate.mu"], atol=1e-6)


def test_freeze() -> None:
    assert gate.freeze(torch.tensor([0.0, 0.5, 0.5001, 1.0])).tolist() == [0, 0, 1, 1]


def test_penalty_is_one_sided_and_squared() -> None:
    p = {k: v.requires_grad_(k in gate.trainable("mlp")) for k, v in params("mlp").items()}
    z = activations(4, 5, RANK)
    runtime = GateRuntime("soft", 1.0)
    apply(z, p, "mlp", 1, False, runtime, "layer")
    assert runtime.penalty() == 0.0
    mean = float(gate.probabilities(gate.logits(p, gate.features(z, 1, False), "mlp"), 1.0).detach().mean())
    runtime.penalty_weight = 2.0
    for target, wanted in ((mean - 0.2, 2.0 * 0.2**2), (mean + 0.1, 0.0)):
        runtime.target_open = target
        for layer in ("one", "two"):
            apply(z, p, "mlp", 1, False, runtime, layer)
        assert float(runtime.penalty()) == pytest.approx(wanted, rel=1e-4)
    runtime.target_open = mean - 0.2
    apply(z, p, "mlp", 1, False, runtime, "two")  # now one layer at 0.04, one at 0
    penalty = runtime.penalty()
    assert isinstance(penalty, Tensor) and float(penalty) == pytest.approx(0.04, rel=1e-4)
    penalty.backward()
    assert p["gate.bias"].grad is not None and (p["gate.bias"].grad > 0).all(), (
        "down the gradient, gates close"
    )
    runtime.end_step()
    assert runtime.penalty() == 0.0


@pytest.mark.parametrize(("mode", "temperature"), [("warm", 1.0), ("soft", 0.0), ("soft", math.nan)])
def test_bad_modes_are_refused(mode: str, temperature: float) -> None:
    with pytest.raises(SpectralAdapterError):
        GateRuntime(mode, temperature)


def test_the_largest_gate_is_open_whatever_its_logit() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0], [-3.0, -1.0, -2.0], [0.0, 0.0, 0.0], [0.0, -1.0, 1e-9]])
    wanted = [[True, False, True], [False, True, False], [True, True, True], [False, False, True]]
    assert gate.opened(logits, 0.0, 0.0).tolist() == wanted
    assert gate.freeze(torch.tensor([0.2, 0.4, 0.1])).tolist() == [0.0, 1.0, 0.0]
    assert gate.freeze(torch.tensor([0.6, 0.4, 0.9])).tolist() == [1.0, 0.0, 1.0]


@every_kind
@pytest.mark.parametrize("mode", gate_runtime.MODES)
def test_a_closed_layer_keeps_a_row_in_every_hard_pass(kind: str, mode: str) -> None:
    p = params(kind)
    p["gate.bias"] = p["gate.bias"] - 50.0
    if kind == "entropy":
        p["gate.entropy_shift"] -= 50.0
    z = activations(4, 5, RANK)
    kept = apply(z, p, kind, 1, False, GateRuntime(mode, 0.5), "layer")
    rows = (kept.abs() > 1e-6).any(1).sum(1)
    assert rows.tolist() == [0 if mode == "soft" else 1] * 4


@every_pairing
@pytest.mark.parametrize(("budget", "kept"), [(0.5, 2), (0.25, 1), (0.01, 1), (0.7, 3), (1.0, 4)])
def test_a_budget_keeps_the_largest(budget: float, kept: int, rows: int) -> None:
    p = params("mlp", rank=4)
    z = activations(6, 5, 4 * rows)
    phi = gate.features(z, rows, False)
    logits = gate.logits(p, phi, "mlp")
    largest = logits.argsort(-1, descending=True)[:, :kept]
    for mode in ("hard", "straight_through", "soft"):
        found = gate.values(z, p, "mlp", rows, False, GateRuntime(mode, 0.5), "layer", budget)
        found = found[:, :4]
        is_open = torch.zeros(6, 4, dtype=torch.bool).scatter(1, largest, True)
        if kept < 4:
            assert torch.equal(found > 0.5, is_open)
        if mode != "soft":
            assert torch.allclose(found, is_open.float() if kept < 4 else torch.ones(6, 4))
        elif kept < 4:
            low, high = logits.sort(-1, descending=True).values[:, kept - 1 : kept + 1].mT
            wanted = torch.sigmoid((logits - ((low + high) / 2)[:, None]) / 0.5)
            assert torch.allclose(found, wanted, atol=1e-6)
            assert torch.allclose(
                gate.probabilities(gate.logits(p, phi, "mlp"), 0.5, budget), wanted, atol=1e-6
            )
    assert gate.freeze(torch.tensor([0.9, 0.8, 0.7, 0.6]), budget).tolist() == [1.0] * kept + [0.0] * (
        4 - kept
    )


# --- the recorder ---------------------------------------------------------------------------------


def test_recorder_counts_open_gates_per_layer_and_noise_level() -> None:
    recorder = GateRecorder(bins=2)
    half = torch.tensor([[True, False, True], [True, False, False]])
    recorder.record("a", half, 0.1)
    recorder.record("a", half, torch.tensor([0.1, 1.0]))
    recorder.record("a", ~half, torch.tensor([0.5, 0.7]))
    recorder.record("closed", torch.zeros(2, 3, dtype=torch.bool), 0.0)
    recorder.record("open", torch.ones(1, 3, dtype=torch.bool), None)
    found = recorder.summary()
    assert json.loads(json.dumps(found)) == found
    assert found["layers"] == ["a", "closed", "open"] and found["ranks"] == [3, 3, 3]
    assert found["effective_rank"][0] == pytest.approx([5 / 3, (1 + 1 + 2) / 3])
    assert found["effective_rank"][1:] == [[0.0, None], [None, None]]
    assert found["mean_effective_rank"] == pytest.approx([9 / 6, 0.0, 3.0])
    assert found["passes"] == [6, 2, 1]
    assert found["input_spread"][0] == pytest.approx([math.sqrt(2) / 3, math.sqrt(2) / 3])
    assert found["switching"] == [1.0, 0.0, 0.0] and found["always_open"] == ["open"]


def test_recorders_merge() -> None:
    parts = [GateRecorder(4) for _ in range(3)]
    draw = torch.Generator().manual_seed(0)
    for i in range(600):  # more than it keeps waiting
        is_open = torch.rand(2, 5, generator=draw) > 0.4
        level = float(torch.rand(1, generator=draw))
        for recorder in (parts[0], parts[1 + i % 2]):
            recorder.record(f"layer {i % 3}", is_open, level)
    parts[1].merge(parts[2])
    whole, merged = parts[0].summary(), parts[1].summary()
    order = [merged["layers"].index(name) for name in whole["layers"]]
    for key in ("mean_effective_rank", "passes", "effective_rank"):
        assert [merged[key][i] for i in order] == whole[key]
    with pytest.raises(SpectralAdapterError, match="bins"):
        parts[0].merge(GateRecorder(5))


def test_recorder_hears_of_every_gated_pass() -> None:
    recorder, p = GateRecorder(2), params("mlp")
    z = activations(4, 5, RANK)
    for mode in ("hard", "soft"):
        runtime = GateRuntime(mode, 0.5, recorder=recorder, progress=0.9)
        apply(z, p, "mlp", 1, False, runtime, "layer")
    opened = (gate.logits(p, gate.features(z, 1, False), "mlp") > 0).float().sum(1).mean()
    assert recorder.summary()["effective_rank"] == [[None, pytest.approx(float(opened))]]
    assert 0 < opened < RANK


def test_recorder_refuses_levels_that_do_not_fit() -> None:
    recorder = GateRecorder()
    recorder.record("a", torch.ones(4, 3).bool(), torch.tensor([0.1, 0.9]))  # a batch doubled by guidance
    assert recorder.summary()["passes"] == [4]
    with pytest.raises(SpectralAdapterError, match="2 noise levels for 3"):
        recorder.record("a", torch.ones(3, 3).bool(), torch.tensor([0.1, 0.9]))
    with pytest.raises(SpectralAdapterError, match="bins"):
        GateRecorder(0)


def test_recording_in_inference_mode_can_be_read_and_continued_outside() -> None:
    recorder = gate.GateRecorder(bins=2)
    with torch.inference_mode():
        for _ in range(300):  # more than are fetched at once
            recorder.record("a", torch.ones(1, 3, dtype=torch.bool), torch.tensor([0.9]))
    recorder.record("a", torch.zeros(1, 3, dtype=torch.bool), 0.1)
    summary = recorder.summary()
    assert summary["passes"] == [301] and summary["effective_rank"] == [[0.0, 3.0]]
