"""Streamed statistics against the activations themselves, in exact and rank space, with gates and files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from spectral_core.analysis.interference import affinity, crosstalk, retention
from spectral_core.attach.attaching import attach
from spectral_core.errors import SpectralAdapterError
from spectral_core.maths.layers import Geometry
from spectral_core.maths.lowrank import delta
from spectral_core.methods import LoRAConfig
from spectral_core.statistics import file as statistics_file
from spectral_core.statistics.collect import Collector, collect, modules_of, patches
from spectral_core.statistics.moments import Statistics, pooled
from tests.core.adapter_cases import GATED as GATED_CONFIGS
from tests.core.adapter_cases import Mixed, instance_keys, mixed_input, mixed_weights, trained
from tests.core.fusion.fusion_cases import GATED, SHAPES, adapter, concepts, inputs, output


class Rows(nn.Module):
    """The layers of the cases, each called with given inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(s.in_features, s.out_features).double() for s in SHAPES.values())


def gathered(adapters, x, space="exact", dtype=torch.float64) -> dict[str, Statistics]:
    """Statistics of the inputs x, seen in two calls."""
    model = Rows()
    with collect(modules_of(model, adapters, "unet"), adapters, space, dtype) as seen:
        for part in (slice(0, 1), slice(1, None)):
            model.a(x["unet.a"][part])
            model.b(input=x["unet.b"][part])
    return seen.statistics()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_over_calls_are_the_second_moment(dtype):
    x, adapters = inputs(1), concepts()
    for name, found in gathered(adapters, x, dtype=dtype).items():
        rows = x[name].flatten(0, 1)
        assert found.count == len(rows) and found.second_moment.dtype == dtype
        assert torch.allclose(found.second_moment.double(), rows.mT @ rows / len(rows), rtol=1e-6)


@pytest.mark.parametrize("space", ["exact", "rank"])
@pytest.mark.parametrize("gated", [False, True])
def test_crosstalk_and_retention_are_those_of_the_activations(space, gated):
    adapters = concepts()
    if gated:
        adapters[1] = adapter(GATED, 5, "live", strength=0.8)
    x = [inputs(i) for i in range(3)]
    found = crosstalk(adapters, [gathered(adapters, given, space) for given in x])
    fused = adapters[0].scaled(0.3)
    kept = retention(fused, adapters, [gathered(adapters, given, space) for given in x], [1.0, -0.5, 2.0])
    tolerance = 1e-9 if space == "exact" else 1e-5  # the basis is kept in float32
    for name in SHAPES:
        for i in range(3):
            outs = [output(a, name, x[i][name]) for a in adapters]
            for j in range(3):
                expected = float(outs[j].norm() / outs[i].norm())
                assert found.layers[name][i][j] == pytest.approx(expected, rel=tolerance)
            own = (1.0, -0.5, 2.0)[i] * outs[i]
            lost = output(fused, name, x[i][name]) - own
            assert kept.layers[name][i] == pytest.approx(float(1 - lost.norm() / own.norm()), abs=tolerance)


def test_a_live_gate_that_was_kept_is_told_from_the_others():
    from spectral_core.fusion import fuse

    adapters = [adapter(GATED, 4, "x"), adapter(GATED, 5, "y", strength=-0.7)]
    x = [inputs(i) for i in range(2)]
    statistics = [gathered(adapters, given) for given in x]
    result = fuse(adapters, "average", [1.0, 2.0], statistics=statistics)
    kept = retention(result.adapter, adapters, statistics, [1.0, 2.0])
    for row in result.report.layers:
        for i, weight in enumerate([1.0, 2.0]):
            given = x[i][row.name]
            own = output(adapters[i], row.name, given, weight)
            lost = output(result.adapter, row.name, given) - own
            expected = float(1 - lost.norm() / own.norm())
            assert row.kept[i].retention == pytest.approx(expected, abs=1e-9)
            assert kept.layers[row.name][i] == pytest.approx(expected, abs=1e-9)


def test_gates_open_and_close_here():
    """The gated cases above must not be fixed updates in disguise."""
    live, x = adapter(GATED, 5), inputs(1)
    opened = gathered([live], x)["unet.a"].gated.mean_open
    assert ((opened > 0.05) & (opened < 0.95)).any()


def test_neighbours_that_get_one_tensor_share_their_sum():
    layers = nn.ModuleDict({n: nn.Linear(6, 4) for n in "qkvo"}).double()
    weights = {f"unet.{n}": layer.weight.detach() for n, layer in layers.items()}
    one = trained(LoRAConfig(2), weights)
    x, other = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(2, 9, 6, dtype=torch.float64)
    with collect(modules_of(layers, [one], "unet"), [one], dtype=torch.float64) as seen:
        for name in "qkv":
            layers[name](x)
        layers["o"](other)
        layers["q"](other)  # q leaves the three once
        x.mul_(2.0)  # the same object with other numbers
        for name in "qkv":
            layers[name](x)
    found = seen.statistics()
    half = (x / 2).flatten(0, 1)
    for name, seen_rows in {"q": [half, other, x], "k": [half, x], "v": [half, x], "o": [other]}.items():
        rows = torch.cat([part.reshape(-1, 6) for part in seen_rows])
        assert torch.allclose(found[f"unet.{name}"].second_moment, rows.mT @ rows / len(rows)), name
    assert found["unet.k"].second_moment is found["unet.v"].second_moment
    assert found["unet.k"].second_moment is not found["unet.q"].second_moment


@pytest.mark.parametrize("inference", [False, True])
def test_a_tensor_that_is_changed_in_place_is_another_input(inference):
    """Hosts run in inference mode, where tensors count no versions."""
    layers = nn.ModuleDict({n: nn.Linear(6, 4) for n in "qkv"}).double()
    one = trained(LoRAConfig(2), {f"unet.{n}": layer.weight.detach() for n, layer in layers.items()})
    with torch.inference_mode(inference), torch.no_grad():
        x = torch.randn(2, 9, 6, dtype=torch.float64)
        first = x.clone()
        with collect(modules_of(layers, [one], "unet"), [one], dtype=torch.float64) as seen:
            layers["q"](x)
            layers["k"](x)
            x.mul_(2.0)  # while the sum of q and k still waits for whoever shares it
            layers["v"](x)
            assert x.is_inference() == inference
        found = seen.statistics()
    rows = first.flatten(0, 1)
    for name, factor in {"q": 1.0, "k": 1.0, "v": 4.0}.items():
        moment = found[f"unet.{name}"].second_moment
        assert torch.allclose(moment, factor * rows.mT @ rows / len(rows)), name
        assert not moment.is_inference()
    assert found["unet.q"].second_moment is found["unet.k"].second_moment


@pytest.mark.parametrize("space", ["exact", "rank"])
def test_sums_are_kept_where_they_are_wanted(space):
    adapters = [concepts()[0], adapter(GATED, 5, "live")]
    x, model = inputs(1), Rows()
    modules, where = modules_of(model, adapters, "unet"), torch.device("meta")
    with collect(modules, adapters, space, torch.float64, device=where) as seen:
        model.a(x["unet.a"])
    found = seen.statistics()["unet.a"]
    assert found.second_moment.device == found.gated.cross.device == found.gated.mean_open.device == where


@pytest.mark.parametrize("space", ["exact", "rank"])
@pytest.mark.parametrize("config", GATED_CONFIGS)
def test_a_whole_model_with_convolutions_fused_rows_and_gates(space, config):
    """Retention of one of two attached adapters, measured against the module's own outputs."""
    model = Mixed()
    weights = mixed_weights(model)
    adapters = [trained(GATED_CONFIGS[config], weights, seed=1), trained(LoRAConfig(2), weights, seed=2)]
    keys, x = instance_keys(model), mixed_input()
    with collect(modules_of(model, adapters, "unet"), adapters, space) as seen, torch.inference_mode():
        model(x)
    assert instance_keys(model) == keys
    found = crosstalk(adapters, [seen.statistics()] * 2)
    assert set(found.layers) == set(weights)
    captured: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in ("conv", "reflect", "linear"):
        module, layer = getattr(model, name), f"unet.{name}"
        given: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(lambda m, args, given=given: given.append(args[0]))
        with torch.no_grad():
            model(x)
            handle.remove()
            plain = module(given[0])
            outs = []
            for one in adapters:
                holder = nn.ModuleDict({name: module})
                with attach(holder, one.only([layer])):
                    outs.append(module(given[0]) - plain)
        captured[layer] = (outs[0], outs[1])
    for layer, (one, two) in captured.items():
        assert found.layers[layer][0][1] == pytest.approx(float(two.norm() / one.norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (
            lambda: nn.Conv2d(4, 9, (5, 3), dilation=(1, 2), padding=(3, 1), padding_mode="circular"),
            (2, 4, 9, 8),
        ),
        (lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (1, 3, 6, 5)),
        (lambda: nn.Conv2d(3, 4, (2, 3), padding="same"), (2, 3, 6, 5)),
        (lambda: nn.Conv2d(3, 4, 3, stride=2, padding="valid"), (2, 3, 6, 5)),
        (lambda: nn.Conv1d(5, 6, 3, padding=1), (2, 5, 8)),
        (lambda: nn.Conv3d(3, 4, (1, 2, 3), stride=(1, 2, 1)), (2, 3, 3, 4, 5)),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_patches_are_what_the_flattened_weight_multiplies(build, size):
    module, x = build().double(), torch.randn(size, dtype=torch.float64)
    rows = patches(x, module.kernel_size, Geometry.of(module)) @ module.weight.flatten(1).mT + module.bias
    assert torch.allclose(rows, module(x).movedim(1, -1).flatten(0, -2))


@pytest.mark.parametrize("space", ["exact", "rank"])
def test_files_keep_statistics_and_shared_sums_once(tmp_path, space):
    adapters, x = [adapter(GATED, 4), concepts()[0]], inputs(2)
    found = gathered(adapters, x, space)
    found["unet.twin"] = found["unet.a"]
    path = statistics_file.save(found, tmp_path / "s.safetensors")
    back = statistics_file.load(path)
    assert set(back) == set(found) and len(back) == 3
    for name, mine in found.items():
        theirs = back[name]
        assert theirs.count == mine.count
        for get in (
            lambda s: s.second_moment,
            lambda s: s.basis,
            lambda s: s.gated.cross,
            lambda s: s.gated.energy,
            lambda s: s.gated.mean_open,
        ):
            assert get(mine) is get(theirs) is None or torch.equal(get(mine), get(theirs))
        assert theirs.gated.keys == mine.gated.keys
    once = statistics_file.save({"unet.a": found["unet.a"]}, tmp_path / "one.safetensors")
    twice = statistics_file.save({n: found[n] for n in ("unet.a", "unet.twin")}, tmp_path / "two.safetensors")
    assert twice.stat().st_size - once.stat().st_size < 1000 or space == "rank"
    with pytest.raises(KeyError):
        back["unet.nothing"]


@pytest.mark.parametrize("space", ["exact", "rank"])
def test_pooled_statistics_are_those_of_both_inputs(space):
    adapters = [adapter(GATED, 4), concepts()[0]]
    one, two = inputs(2), {name: x[:2] for name, x in inputs(7).items()}
    both = gathered(adapters, {name: torch.cat([one[name], two[name]]) for name in one}, space)
    first = gathered(adapters, one, space)
    before = first["unet.a"].second_moment.clone()
    first["unet.twin"] = replace(first["unet.a"])  # as neighbours that get one tensor have it
    second = gathered(adapters, two, space)
    second["unet.twin"] = replace(second["unet.a"])
    with torch.inference_mode():  # as a host has it
        found = pooled(first, second)
    for name, expected in both.items():
        assert found[name].count == expected.count
        for get in (
            lambda s: s.second_moment,
            lambda s: s.gated.cross,
            lambda s: s.gated.energy,
            lambda s: s.gated.mean_open,
        ):
            assert torch.allclose(get(found[name]), get(expected)) and not get(found[name]).is_inference()
    assert found["unet.twin"].second_moment is found["unet.a"].second_moment
    assert torch.equal(first["unet.a"].second_moment, before), "what was kept is not changed"


def test_pooled_statistics_keep_what_one_look_alone_has():
    adapters = concepts()
    found = gathered(adapters, inputs(1))
    assert pooled({"unet.a": found["unet.a"]}, found).keys() == found.keys()
    assert pooled({}, found) == found == pooled(found, {})


def test_statistics_of_other_adapters_are_not_pooled():
    x, adapters = inputs(1), [adapter(GATED, 4), concepts()[0]]
    full, small = gathered(adapters, x), gathered(adapters, x, "rank")
    other, swapped = gathered(concepts(), x, "rank"), gathered(adapters[::-1], x)
    for one, two in ((full, small), (small, other), (full, swapped)):
        with pytest.raises(SpectralAdapterError, match=r"layer unet\.\w: statistics in different"):
            pooled(one, two)


def test_other_files_are_refused(tmp_path):
    from spectral_core.files.writing import write

    path = write({"x": torch.ones(2)}, {"a": "b"}, tmp_path / "x.safetensors")
    with pytest.raises(SpectralAdapterError, match=r"x\.safetensors: .* holds no statistics"):
        statistics_file.load(path)
    broken = {
        "spectral_statistics": json.dumps({"version": 1, "layers": {"unet.a": {"count": 3, "moment": "y"}}})
    }
    path = write({"x": torch.ones(2)}, broken, tmp_path / "y.safetensors")
    with pytest.raises(SpectralAdapterError, match=r"unet\.a"):
        statistics_file.load(path)


def test_refused():
    adapters, model = concepts(), Rows()
    modules = modules_of(model, adapters, "unet")
    with pytest.raises(SpectralAdapterError, match=r"exact statistics of 2 layers need .* \(space='rank'\)"):
        Collector(modules, adapters, "exact", torch.float32, 500)
    with pytest.raises(SpectralAdapterError, match="space 'wide'"):
        Collector(modules, adapters, "wide", torch.float32, 500)
    with pytest.raises(SpectralAdapterError, match="no layer to watch"):
        Collector({"unet.z": model.a}, adapters, "rank", torch.float32, 500)
    live = [adapter(GATED, 4)]
    plain = {"unet.a": Statistics.of(inputs(1)["unet.a"])}
    with pytest.raises(SpectralAdapterError, match=r"layer unet\.a: an adaptive gate has no fixed ΔW"):
        crosstalk(live, [plain])
    with pytest.raises(SpectralAdapterError, match="in another order"):
        wide = [adapter(GATED, 4), adapter(type(GATED)(2), 5)]
        crosstalk([wide[1], wide[0]], [gathered(wide, inputs(1))] * 2)


def test_hooks_come_off_when_the_model_fails():
    model, adapters = Rows(), concepts()
    with pytest.raises(RuntimeError), collect(modules_of(model, adapters, "unet"), adapters):
        model.a(torch.ones(3, 99, dtype=torch.float64))
    assert not model.a._forward_pre_hooks and not model.b._forward_pre_hooks


def test_affinity_is_crosstalk_on_what_the_other_responds_to():
    adapters = concepts()
    found = affinity(adapters)
    squares = torch.zeros(3, 3, dtype=torch.float64)
    for name, shape in SHAPES.items():
        d = [delta(a.layers[name].factors(a.strength_of(name))) for a in adapters]
        for i in range(3):
            for j in range(3):
                ratio = float((d[j] @ d[i].mT).norm() / (d[i] @ d[i].mT).norm())
                assert found.layers[name][i][j] == pytest.approx(ratio, rel=1e-9), shape
                squares[i, j] += ((d[j] @ d[i].mT).norm() / d[i].norm()) ** 2
    for i in range(3):
        for j in range(3):
            expected = float((squares[i, j] / squares[i, i]).sqrt())
            assert found.total[i][j] == pytest.approx(expected, rel=1e-9)
