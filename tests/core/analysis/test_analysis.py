"""Analysis against dense linear algebra in float64: spectra, overlap, crosstalk, retention, summaries."""

from __future__ import annotations

import json

import pytest
import torch

from spectral_core.adapter.adapter import Adapter, AdapterLayer, Provenance, Term
from spectral_core.adapter.schedule import Schedule
from spectral_core.analysis.interference import Statistics, crosstalk, output_norm, overlap, retention
from spectral_core.analysis.spectra import (
    effective_rank,
    gate_summary,
    layer_spectra,
    stable_rank,
    summary,
    summary_text,
)
from spectral_core.errors import SpectralAdapterError
from spectral_core.gates.formula import GateRecorder
from spectral_core.maths.layers import LayerShape
from spectral_core.maths.lowrank import delta
from spectral_core.methods import FouRAConfig, LoRAConfig, SpectralAConfig, method_of

SHAPES = {"unet.q": LayerShape(14, 19), "unet.conv": LayerShape(8, 5, (3, 3))}


def lora(rank: int, seed: int, name: str = "", shapes=SHAPES, **fields) -> Adapter:
    gen = torch.Generator().manual_seed(seed)
    layers = {}
    for layer, shape in shapes.items():
        down = torch.randn(rank, shape.in_features, *shape.kernel, generator=gen, dtype=torch.float64)
        up = torch.randn(shape.out_features, rank, generator=gen, dtype=torch.float64)
        layers[layer] = AdapterLayer(shape, (Term(LoRAConfig(rank, alpha=2.0), {"down": down, "up": up}),))
    return Adapter(layers, Provenance(name=name), **fields)


def adaptive(seed: int) -> Adapter:
    gen = torch.Generator().manual_seed(seed)
    shape = SHAPES["unet.q"]
    config = FouRAConfig(4)
    sizes = method_of(config).tensor_shapes(config, shape)
    params = {name: torch.randn(size, generator=gen) for name, size in sizes.items()}
    return Adapter({"unet.q": AdapterLayer(shape, (Term(config, params),))})


def dense(adapter: Adapter, name: str) -> torch.Tensor:
    return delta(adapter.layers[name].factors(adapter.strength_of(name))).flatten(1)


def activations(seed: int) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {n: torch.randn(2, 30, s.fan_in, generator=gen, dtype=torch.float64) for n, s in SHAPES.items()}


def test_spectra_equal_the_dense_ones():
    adapter = lora(3, 1, strength=-0.5, layer_strengths=(("*conv", 3.0),))
    weights = {n: torch.randn(s.weight_shape) for n, s in SHAPES.items()}
    for name, spectrum in layer_spectra(adapter, weights).items():
        exact = torch.linalg.svdvals(dense(adapter, name))[:3]
        assert torch.allclose(torch.tensor(spectrum.singular_values, dtype=torch.float64), exact, rtol=1e-10)
        share = exact / exact.sum()
        assert spectrum.effective_rank == pytest.approx(float((-(share * share.log()).sum()).exp()))
        assert spectrum.stable_rank == pytest.approx(float(exact.square().sum() / exact[0] ** 2))
        assert spectrum.norm == pytest.approx(float(exact.norm()))
        assert spectrum.spectral_norm == pytest.approx(float(exact[0]))
        assert spectrum.relative_norm == pytest.approx(float(exact.norm() / weights[name].double().norm()))
        assert not spectrum.gated


@pytest.mark.parametrize("measure", [effective_rank, stable_rank])
def test_rank_measures(measure):
    assert measure(torch.full((7,), 0.3)) == pytest.approx(7)
    assert measure(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert measure(torch.zeros(4)) == 0
    assert measure(torch.zeros(0)) == 0
    assert 1 < measure(torch.tensor([1.0, 0.5, 0.1])) < 3


def test_an_adaptive_layer_counts_with_every_row_open():
    assert layer_spectra(adaptive(1))["unet.q"].gated
    assert len(layer_spectra(adaptive(1))["unet.q"].singular_values) == 4


def test_a_zero_adapter_has_a_spectrum():
    spectrum = layer_spectra(lora(2, 1).scaled(0.0))["unet.q"]
    assert (spectrum.norm, spectrum.effective_rank, spectrum.stable_rank) == (0, 0, 0)


def test_a_weight_of_another_model_is_refused():
    with pytest.raises(
        SpectralAdapterError, match=r"unet\.q: the base weight is 3×4, the adapter's layer 14×19"
    ):
        layer_spectra(lora(2, 1), {"unet.q": torch.ones(3, 4)})


@pytest.mark.parametrize("ranks", [(2, 2), (1, 4), (5, 3)])
def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles(ranks):
    adapters = [lora(ranks[0], 1), lora(ranks[1], 2)]
    for row in overlap(adapters):
        a, b = (torch.linalg.svd(dense(x, row.layer), full_matrices=False) for x in adapters)
        rows = torch.linalg.svdvals(a[2][: ranks[0]] @ b[2][: ranks[1]].mT)
        columns = torch.linalg.svdvals(a[0][:, : ranks[0]].mT @ b[0][:, : ranks[1]])
        assert row.ranks == ranks
        assert row.row == pytest.approx(float(rows.square().mean()))
        assert row.column == pytest.approx(float(columns.square().mean()))
        shape = SHAPES[row.layer]
        assert row.row_random == max(ranks) / shape.fan_in
        assert row.column_random == max(ranks) / shape.out_features
    assert len(overlap(adapters)) == 2


def test_overlap_of_equal_and_of_random_updates():
    same = overlap([lora(3, 1), lora(3, 1).scaled(2.0)])
    assert all(row.row == pytest.approx(1) and row.column == pytest.approx(1) for row in same)
    wide = {"unet.q": LayerShape(90, 120)}
    rows = [
        r
        for seed in range(12)
        for r in overlap([lora(4, seed, shapes=wide), lora(9, seed + 99, shapes=wide)])
    ]
    assert sum(r.row for r in rows) / len(rows) == pytest.approx(rows[0].row_random, rel=0.1)
    assert sum(r.column for r in rows) / len(rows) == pytest.approx(rows[0].column_random, rel=0.1)


def test_overlap_skips_zero_updates_and_refuses_other_shapes():
    assert overlap([lora(2, 1), lora(2, 2).scaled(0.0)]) == []
    with pytest.raises(SpectralAdapterError, match="different base models"):
        overlap([lora(2, 1), lora(2, 2, shapes={"unet.q": LayerShape(3, 4)})])


@pytest.mark.parametrize("wrap", [lambda x: x, Statistics.of], ids=["activations", "statistics"])
def test_output_norm(wrap):
    x = activations(3)
    for name, layer in lora(3, 1).layers.items():
        outputs = x[name].reshape(-1, x[name].shape[-1]) @ dense(lora(3, 1), name).mT
        expected = float(outputs.square().sum(1).mean().sqrt())
        assert output_norm(layer.factors(), wrap(x[name])) == pytest.approx(expected, rel=1e-10)


def test_output_norm_of_a_convolution_takes_unfolded_patches():
    layer, image = lora(3, 1).layers["unet.conv"], torch.randn(2, 5, 7, 7, dtype=torch.float64)
    patches = torch.nn.functional.unfold(image, 3).movedim(1, -1)
    outputs = torch.nn.functional.conv2d(image, delta(layer.factors()))
    expected = float(outputs.square().sum(1).mean().sqrt())
    assert output_norm(layer.factors(), patches) == pytest.approx(expected)
    with pytest.raises(SpectralAdapterError, match="inputs of width 5 for a layer 8×5×3×3: expected 45"):
        output_norm(layer.factors(), image.movedim(1, -1))


@pytest.mark.parametrize("wrap", [lambda x: x, Statistics.of], ids=["activations", "statistics"])
def test_crosstalk_and_retention_follow_their_formulas(wrap):
    adapters, weights = [lora(2, 1), lora(3, 2, strength=0.4)], [0.7, 1.5]
    x = [activations(5), activations(6)]
    given = [{n: wrap(v) for n, v in part.items()} for part in x]
    fused = lora(4, 9)
    cross, kept = crosstalk(adapters, given), retention(fused, adapters, given, weights)
    squares = torch.zeros(2, 2, 2, dtype=torch.float64)
    for name in SHAPES:
        d = [dense(a, name) for a in adapters]
        flat = [part[name].flatten(0, 1).mT for part in x]
        for i, j in ((0, 1), (1, 0), (0, 0)):
            assert cross.layers[name][i][j] == pytest.approx(
                float((d[j] @ flat[i]).norm() / (d[i] @ flat[i]).norm())
            )
        for i in range(2):
            lost = (dense(fused, name) - weights[i] * d[i]) @ flat[i]
            had = weights[i] * d[i] @ flat[i]
            assert kept.layers[name][i] == pytest.approx(float(1 - lost.norm() / had.norm()))
            squares[i] += torch.stack([lost.square().sum(), had.square().sum()])[:, None]
    for i in range(2):
        assert kept.total[i] == pytest.approx(float(1 - (squares[i, 0, 0] / squares[i, 1, 0]).sqrt()))
    json.dumps([cross.total, kept.total])


def test_retention_knows_its_ends():
    one, x = lora(2, 1), activations(5)
    assert retention(one, [one], [x]).total[0] == pytest.approx(1, abs=1e-7)
    assert retention(one.scaled(2.0), [one], [x]).total[0] == pytest.approx(0, abs=1e-7)
    assert retention(one.only(["unet.q"]), [one], [{"unet.conv": x["unet.conv"]}]).total[0] == pytest.approx(
        0
    )
    assert retention(one, [one.scaled(0.0)], [x]).total == (None,)


def test_interference_names_the_layer_of_an_adaptive_gate():
    x = {"unet.q": torch.randn(5, 19)}
    with pytest.raises(
        SpectralAdapterError, match=r"layer unet\.q: an adaptive gate has no fixed ΔW: freeze"
    ):
        crosstalk([adaptive(1)], [x])
    with pytest.raises(SpectralAdapterError, match="inputs of 0 concepts for 1 adapters"):
        crosstalk([adaptive(1)], [])


def test_summary():
    shape = SHAPES["unet.q"]
    spectral = Term(SpectralAConfig((2, 3)), {"a_u": torch.ones(14, 2), "a_v": torch.ones(19, 2)})
    adapter = Adapter(
        {"unet.q": AdapterLayer(shape, (spectral,)), "text_encoder.x": AdapterLayer(shape, (spectral,))},
        Provenance(name="vase", trigger_words=("vase",), parents=({"name": "old"},)),
        strength=0.5,
        schedule=Schedule.window(0, 0.5),
    )
    facts = summary(adapter)
    assert facts["layers_per_part"] == {"unet": 1, "text_encoder": 1}
    assert facts["parameters"] == 2 * 2 * (14 + 19) and not facts["mergeable"]
    assert facts["configurations"] == [
        {"method": "spectral_a", "columns": (2, 3), "train_scale": False, "terms": 2}
    ]
    json.dumps(facts)
    text = summary_text(adapter)
    for line in ("vase: 2 layers (1 in unet, 1 in text_encoder), 132 parameters", "2 columns from 2: 2 terms",
                 "applied live", "strength 0.5", "parents: old"):  # fmt: skip
        assert line in text
    assert "foura dct, adaptive gate, rank 4: 1 terms" in summary_text(adaptive(1))


def test_gate_summary_from_a_recorder():
    recorder = GateRecorder(bins=4)
    recorder.record("unet.a", torch.tensor([[True, True, False, False]]), 0.0)
    recorder.record("unet.a", torch.tensor([[True, False, False, False]]), 0.9)
    recorder.record("unet.b", torch.tensor([[True, True]]), 0.9)
    facts = gate_summary(recorder.summary())
    assert facts["per_layer"] == {"unet.a": 1.5 / 4, "unet.b": 1.0}
    assert facts["open_share"] == pytest.approx(3.5 / 6)
    assert facts["by_noise"] == [0.5, None, None, 0.5]
    assert facts["always_open"] == ["unet.b"]
    assert facts["switching"] == pytest.approx(1 / 6), "the second of a's gates"
    assert gate_summary(GateRecorder().summary())["open_share"] is None


def test_a_layer_whose_gates_are_all_closed_has_no_output() -> None:
    """Frozen at rank 0, as short trainings leave some layers."""
    from spectral_core.analysis.interference import output_norm
    from spectral_core.maths.lowrank import Factors
    from spectral_core.statistics.moments import Statistics

    closed, inputs = Factors(torch.zeros(0, 6), torch.zeros(4, 0)), torch.randn(9, 6)
    assert output_norm(closed, inputs) == output_norm(closed, Statistics.of(inputs)) == 0.0
