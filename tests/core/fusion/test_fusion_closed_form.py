"""Closed-form, rank-space and gradient fusion against dense formulas and perturbations, in float64."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spectral_core.adapter.adapter import Adapter, AdapterLayer, Term
from spectral_core.errors import SpectralAdapterError
from spectral_core.fusion import FusionOptions, fuse, separated
from spectral_core.gates import formula as gates
from spectral_core.gates.formula import GateRuntime
from spectral_core.maths.layers import LayerShape
from spectral_core.maths.lowrank import delta
from spectral_core.methods import FouRAConfig, LoRAConfig, OrthogonalConfig, SpectralAConfig
from spectral_core.statistics.moments import Statistics
from tests.core.fusion.fusion_cases import GATED, SHAPES, adapter, concepts, draw, inputs, output
from tests.core.fusion.test_fusion_statistics import gathered

WEIGHTS = [1.0, -0.7, 1.8]


def dense(adapted, layer, strength=1.0):
    if layer not in adapted.layers:
        return torch.zeros(SHAPES[layer].weight_shape, dtype=torch.float64)
    return delta(adapted.layers[layer].factors(adapted.strength_of(layer) * strength))


def objective(update: Tensor, adapters, x, layer: str, weights=WEIGHTS) -> float:
    """Σᵢ mean over tokens of ‖sᵢΔWᵢ x − ΔW x‖², from the activations."""
    total = 0.0
    for i, (one, weight) in enumerate(zip(adapters, weights, strict=False)):
        given = x[i][layer]
        lost = output(one, layer, given, weight) if layer in one.layers else 0.0
        total += float((lost - given @ update.mT).square().sum(-1).mean())
    return total


def case(gated=False):
    adapters = concepts()
    if gated:
        adapters[1] = adapter(GATED, 5, "live", strength=0.8)
    x = [inputs(i) for i in range(3)]
    return adapters, x


@pytest.mark.parametrize("ridge", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("with_base", [False, True])
def test_exact_form_is_the_formula(ridge, with_base):
    adapters, x = case()
    given = [gathered(adapters, part) for part in x]
    base = gathered(adapters, inputs(9)) if with_base else None
    options = FusionOptions(ridge=ridge, base_weight=0.6)
    result = fuse(adapters, "closed-form", WEIGHTS, statistics=given, base_statistics=base, options=options)
    for layer, shape in SHAPES.items():
        c = [part[layer].flatten(0, 1).mT @ part[layer].flatten(0, 1) / 60 for part in x]
        total = sum(c)
        if with_base:
            rows = inputs(9)[layer].flatten(0, 1)
            total = total + 0.6 * rows.mT @ rows / 60
        lam = ridge * float(total.trace()) / shape.in_features
        eye = torch.eye(shape.in_features, dtype=torch.float64)
        updates = [dense(a, layer, w) for a, w in zip(adapters, WEIGHTS, strict=True)]
        target = sum(d @ (ci + lam / 3 * eye) for d, ci in zip(updates, c, strict=True))
        expected = target @ torch.linalg.inv(total + lam * eye)
        found = dense(result.adapter, layer)
        assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9)
        row = next(r for r in result.report.layers if r.name == layer)
        assert row.form == "closed-form" and row.rank_after == sum(
            a.layers[layer].factors().rank for a in adapters
        )


def test_ridge_of_a_gated_concept_goes_to_its_mean_opening():
    adapters, x = case(gated=True)
    given = [gathered(adapters, part) for part in x]
    found = fuse(adapters, "closed-form", WEIGHTS, statistics=given, options=FusionOptions(ridge=0.7)).adapter
    for layer, shape in SHAPES.items():
        rows = [part[layer].flatten(0, 1) for part in x]
        total = sum(r.mT @ r / 60 for r in rows)
        lam = 0.7 * float(total.trace()) / shape.in_features
        target = torch.zeros(shape.weight_shape, dtype=torch.float64)
        for i, one in enumerate(adapters):
            y = output(one, layer, x[i][layer], WEIGHTS[i]).flatten(0, 1)
            factors = one.layers[layer].terms[0].factors(shape, WEIGHTS[i] * one.strength_of(layer))
            opening = torch.ones(factors.rank, dtype=torch.float64)
            if not one.layers[layer].mergeable:
                z = x[i][layer] @ factors.down.mT
                params = one.layers[layer].terms[0].params
                opening = gates.values(z, params, "mlp", 1, False, GateRuntime(), layer).mean(0)
                assert 0 < float(opening.mean()) < 1
            target += y.mT @ rows[i] / 60 + lam / 3 * (factors.scaled_up() * opening) @ factors.down
        expected = target @ torch.linalg.inv(total + lam * torch.eye(shape.in_features, dtype=torch.float64))
        assert torch.allclose(dense(found, layer), expected, rtol=1e-7, atol=1e-9)


def test_large_ridge_is_the_average_and_equal_inputs_too():
    adapters, x = case()
    given = [gathered(adapters, part) for part in x]
    far = fuse(adapters, "closed-form", WEIGHTS, statistics=given, options=FusionOptions(ridge=1e9)).adapter
    same = fuse(adapters, "closed-form", WEIGHTS, statistics=[given[0]] * 3).adapter
    mean = fuse(adapters, "average", WEIGHTS).adapter
    for layer in SHAPES:
        assert torch.allclose(dense(far, layer), dense(mean, layer), rtol=1e-5, atol=1e-7)
        assert torch.allclose(dense(same, layer), dense(mean, layer), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gated", [False, True])
def test_without_ridge_nothing_is_better(gated):
    """On the activations themselves, gates opening per batch row; also nothing that L-BFGS finds."""
    adapters, x = case(gated)
    given = [gathered(adapters, part) for part in x]
    options = FusionOptions(ridge=0.0, iterations=400)
    best = fuse(adapters, "closed-form", WEIGHTS, statistics=given, options=options)
    descended = fuse(adapters, "gradient", WEIGHTS, statistics=given, options=options)
    assert best.report.mergeable
    for layer, shape in SHAPES.items():
        update = dense(best.adapter, layer)
        least = objective(update, adapters, x, layer)
        for seed in range(5):
            shaken = update + 1e-3 * draw(seed, *shape.weight_shape)
            assert objective(shaken, adapters, x, layer) > least
        reached = objective(dense(descended.adapter, layer), adapters, x, layer)
        average = objective(
            dense(fuse(adapters, "average", WEIGHTS, freeze_gates=True).adapter, layer), adapters, x, layer
        )
        assert least <= reached * (1 + 1e-9) and reached <= least * 1.001
        assert average > 1.05 * least


def test_gradient_descends_as_with_the_whole_weight():
    """The reduced variables go where L-BFGS on ΔW itself goes; only its first trial step differs."""
    adapters, x = case()
    given = [gathered(adapters, part) for part in x]
    layer = "unet.a"
    found = fuse(adapters, "gradient", WEIGHTS, statistics=given, options=FusionOptions(iterations=6)).adapter
    c = [part[layer].second_moment for part in given]
    updates = [dense(a, layer, w) for a, w in zip(adapters, WEIGHTS, strict=True)]
    total, cross = sum(c), sum(d @ ci for d, ci in zip(updates, c, strict=True))
    whole = (sum(updates) / 3).clone().requires_grad_()
    unit = 1 / float(total.diagonal().mean())
    optimiser = torch.optim.LBFGS(
        [whole], max_iter=6, max_eval=12, history_size=10, tolerance_grad=0, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimiser.zero_grad()
        loss = unit * ((whole @ total * whole).sum() - 2 * (cross * whole).sum())
        loss.backward()
        return loss

    optimiser.step(closure)
    moved = float((whole.detach() - sum(updates) / 3).norm())
    assert float((dense(found, layer) - whole.detach()).norm()) < 1e-3 * moved


@pytest.mark.parametrize("space", ["exact", "rank"])
@pytest.mark.parametrize("gated", [False, True])
def test_rank_space_is_its_formula(space, gated):
    """B′ = [B…] Q (G + λI)⁻¹ on the activations' own z = P x."""
    adapters, x = case(gated)
    given = [gathered(adapters, part, space) for part in x]
    result = fuse(adapters, "closed-form-rank", WEIGHTS, statistics=given)
    for layer, shape in SHAPES.items():
        ups, downs = [], []
        for one, weight in zip(adapters, WEIGHTS, strict=True):
            factors = one.layers[layer].terms[0].factors(shape, weight * one.strength_of(layer))
            ups.append(factors.scaled_up())
            downs.append(factors.down)
        p = torch.linalg.qr(torch.cat(downs).mT)[0].mT
        g = sum((part[layer].flatten(0, 1) @ p.mT).mT @ (part[layer].flatten(0, 1) @ p.mT) / 60 for part in x)
        q = []
        for i, one in enumerate(adapters):
            rows = x[i][layer].flatten(0, 1)
            if one.layers[layer].mergeable:
                v = rows @ downs[i].mT
            else:  # through what the adapter puts out: its up projection has full column rank here
                v = output(one, layer, x[i][layer], WEIGHTS[i]).flatten(0, 1) @ torch.linalg.pinv(ups[i]).mT
            q.append(v.mT @ (rows @ p.mT) / 60)
        lam = 1e-3 * float(g.trace()) / len(p)
        solved = torch.cat(q) @ torch.linalg.inv(g + lam * torch.eye(len(p), dtype=torch.float64))
        expected = torch.cat(ups, 1) @ solved @ p
        found = dense(result.adapter, layer)
        assert torch.allclose(found, expected, rtol=1e-3, atol=3e-5), (found - expected).abs().max()
    assert all(row.form == "closed-form in rank space" for row in result.report.layers)


def test_too_few_tokens_go_to_rank_space_and_say_so():
    adapters, x = case()
    few = [{n: Statistics.of(v.flatten(0, 1)[:8]) for n, v in part.items()} for part in x]
    options = FusionOptions(exact_from=1.0)
    report = fuse(adapters, "closed-form", WEIGHTS, statistics=few, options=options).report
    rows = {row.name: row for row in report.layers}
    forced = fuse(adapters, "closed-form", statistics=few).report
    assert {row.form for row in forced.layers} == {"closed-form"}
    lifted = FusionOptions(ridge=0.1 * 10 / 8)  # the ridge grows as the tokens fall short of the width
    many = [{n: replace(s, count=60) for n, s in part.items()} for part in few]
    same = fuse(adapters, "closed-form", statistics=many, options=lifted).adapter
    plain = fuse(adapters, "closed-form", statistics=few).adapter
    assert torch.allclose(dense(plain, "unet.a"), dense(same, "unet.a"), rtol=1e-9)
    assert not torch.allclose(dense(plain, "unet.b"), dense(same, "unet.b"), rtol=1e-4)
    assert rows["unet.a"].note == "in rank space: 8 tokens for a width of 10"
    assert rows["unet.b"].form == "closed-form"


def test_layers_and_statistics_that_some_concepts_lack():
    adapters, x = case()
    adapters[2] = adapters[2].only(["unet.a"])
    given = [gathered(adapters, part) for part in x]
    found = fuse(adapters, "closed-form", statistics=given, options=FusionOptions(ridge=0.0)).adapter
    update = dense(found, "unet.b")
    least = objective(update, adapters, x, "unet.b", [1.0] * 3)
    assert objective(update + 1e-3 * draw(1, 9, 6), adapters, x, "unet.b", [1.0] * 3) > least
    del given[1]["unet.b"]
    result = fuse(adapters, "closed-form", statistics=given)
    row = next(r for r in result.report.layers if r.name == "unet.b")
    assert row.form == "average" and "no statistics" in row.note and row.kept == ()
    assert torch.allclose(
        dense(result.adapter, "unet.b"), (dense(adapters[0], "unet.b") + dense(adapters[1], "unet.b")) / 3
    )


def test_a_dropped_concept_takes_its_statistics_with_it():
    adapters, x = case()
    given = [gathered(adapters, part) for part in x]
    left = fuse(adapters, "closed-form", [1.0, 0.0, 1.0], statistics=given).adapter
    pair = fuse([adapters[0], adapters[2]], "closed-form", statistics=[given[0], given[2]]).adapter
    for layer in SHAPES:
        assert torch.allclose(dense(left, layer), dense(pair, layer))


@pytest.mark.parametrize("method", ["sum", "closed-form"])
@pytest.mark.parametrize("space", ["exact", "rank"])
@pytest.mark.parametrize("rank", [1, 3])
def test_compression_keeps_the_outputs_on_the_inputs(method, space, rank):
    """No update of this rank is nearer on all concepts' inputs together."""
    adapters, x = case()
    given = [gathered(adapters, part, space) for part in x]
    whole = fuse(adapters, method, WEIGHTS, statistics=given).adapter
    small = fuse(adapters, method, WEIGHTS, rank=rank, statistics=given)
    for layer in SHAPES:
        total = sum(part[layer].flatten(0, 1).mT @ part[layer].flatten(0, 1) / 60 for part in x)
        values, vectors = torch.linalg.eigh(total)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
        change = (dense(small.adapter, layer) - dense(whole, layer)) @ root
        s = torch.linalg.svdvals(dense(whole, layer) @ root)
        assert float(change.norm()) == pytest.approx(float(s[rank:].norm()), rel=1e-3)
        row = next(r for r in small.report.layers if r.name == layer)
        assert row.error == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-3)
        assert row.rank_after == rank and row.norm == pytest.approx(float(s.norm()), rel=1e-3)


def test_subspaces_are_their_formula():
    adapters, ridge = concepts(), 0.4
    found = fuse(adapters, "subspaces", WEIGHTS, options=FusionOptions(subspace_ridge=ridge))
    for layer, shape in SHAPES.items():
        updates = [dense(a, layer, w) for a, w in zip(adapters, WEIGHTS, strict=True)]
        shares = []
        for one in adapters:
            rows = one.layers[layer].factors().down
            projector = torch.linalg.pinv(rows) @ rows
            shares.append(projector / projector.trace())
        dim = int(torch.linalg.matrix_rank(torch.cat([a.layers[layer].factors().down for a in adapters])))
        lam = ridge * sum(float(p.trace()) for p in shares) / dim
        eye = torch.eye(shape.in_features, dtype=torch.float64)
        pairs = zip(updates, shares, strict=True)
        target = sum(d @ (p + lam / 3 * eye) for d, p in pairs)
        expected = target @ torch.linalg.inv(sum(shares) + lam * eye)
        assert torch.allclose(dense(found.adapter, layer), expected, rtol=1e-7, atol=1e-9)
        assert not torch.allclose(expected, sum(updates) / 3, rtol=1e-2)
    assert {row.form for row in found.report.layers} == {"subspaces"}


def test_subspaces_between_the_sum_and_the_average():
    down = torch.linalg.qr(draw(1, 10, 10))[0]

    def at(one, rows):
        kept = one.only(["unet.a"])
        return kept.map_terms(lambda _, t: replace(t, params=dict(t.params) | {"down": down[rows]}))

    made = [adapter(LoRAConfig(2), k) for k in range(2)]
    apart, same = ([at(m, slice(k * step, k * step + 2)) for k, m in enumerate(made)] for step in (2, 0))
    options = FusionOptions(subspace_ridge=1e-9)
    total = dense(fuse(apart).adapter, "unet.a")
    assert torch.allclose(dense(fuse(apart, "subspaces", options=options).adapter, "unet.a"), total)
    half = dense(fuse(same, "average").adapter, "unet.a")
    assert torch.allclose(dense(fuse(same, "subspaces").adapter, "unet.a"), half)
    live = [adapter(GATED, 4), adapter(LoRAConfig(2), 5)]
    kept = fuse(live, "subspaces").report
    assert all(row.form == "average" and "freeze" in row.note for row in kept.layers)
    assert all(row.form == "subspaces" for row in fuse(live, "subspaces", freeze_gates=True).report.layers)


@pytest.mark.parametrize("method", ["sum", "closed-form", "gradient"])
def test_one_layers_statistics_at_a_time(method):
    """Ten adapters of a large model fit into memory because nothing outlives its layer."""
    adapters, x = case()
    alive: list[tuple[str, weakref.ref[Statistics]]] = []

    class Stored(Mapping):
        def __init__(self, given):
            self.given = given

        def __contains__(self, name):
            return name in self.given

        def __iter__(self):
            return iter(self.given)

        def __len__(self):
            return len(self.given)

        def __getitem__(self, name):
            gc.collect()
            assert not any(ref() is not None for layer, ref in alive if layer != name)
            found = Statistics(self.given[name].second_moment.clone(), 60)
            alive.append((name, weakref.ref(found)))
            return found

    fuse(adapters, method, rank=2, statistics=[Stored(gathered(adapters, part)) for part in x])
    assert len(alive) == len(adapters) * len(SHAPES), "each is read once"


def test_report_has_each_concepts_retention():
    adapters, x = case()
    given = [gathered(adapters, part) for part in x]
    result = fuse(adapters, "closed-form", WEIGHTS, statistics=given)
    for i, concept in enumerate(result.report.concepts):
        had = lost = 0.0
        for layer in SHAPES:
            own = output(adapters[i], layer, x[i][layer], WEIGHTS[i])
            gone = own - x[i][layer] @ dense(result.adapter, layer).mT
            had, lost = had + float(own.square().sum()), lost + float(gone.square().sum())
        assert concept.retention == pytest.approx(1 - (lost / had) ** 0.5, rel=1e-9)
    assert f"one {result.report.concepts[0].retention:.1%}" in result.report.text
    assert set(result.report.pictures()) == {"retention"}
    bare = fuse(adapters).report
    assert bare.concepts[0].retention is None and bare.pictures() == {} and "retention" not in bare.text


def test_orthogonal_blocks_do_not_touch_each_other():
    made = [adapter(OrthogonalConfig(2, block=k), k, f"c{k}") for k in range(2)]
    from spectral_core.methods.orthogonal import orthogonal_rows

    def placed(one, k):
        def rows(name, t):
            down = orthogonal_rows(SHAPES[name].in_features, 2 * k, 2 * k + 2, 0)
            return replace(t, params=dict(t.params) | {"down": down})

        return one.map_terms(rows)

    apart = [placed(one, k) for k, one in enumerate(made)]
    result = fuse(apart, "orthogonal", [1.0, -0.5])
    for row in result.report.layers:
        assert row.form == "orthogonal" and not row.note
        d = [dense(a, row.name) for a in apart]
        assert torch.allclose(dense(result.adapter, row.name), d[0] - 0.5 * d[1])
        assert float((d[0] @ d[1].mT).norm()) < 1e-12
    coinciding = fuse([placed(one, 0) for one in made], "orthogonal")
    assert all(r.form == "sum" and "c0 and c1 share directions" in r.note for r in coinciding.report.layers)


def test_separated_columns_leave_no_mixed_terms():
    def made(columns, seed):
        one = adapter(SpectralAConfig(columns), seed)

        def based(name, t):
            u, s, vh = torch.linalg.svd(
                draw(sum(map(ord, name)), *SHAPES[name].weight_shape), full_matrices=False
            )
            at = list(columns)
            return replace(t, params=dict(t.params) | {"u": u[:, at], "s": s[at], "v": vh[at].mT})

        return one.map_terms(based)

    before = [made((0, 1), 1), made((2, 3), 2), adapter(LoRAConfig(2), 3), made((1, 4), 4)]
    after = separated(before)
    for layer in SHAPES:
        params = [a.layers[layer].terms[0].params for a in after]
        for i, j in itertools.permutations((0, 1, 3), 2):
            shared = {0: (0, 1), 1: (2, 3), 3: (1, 4)}
            only = [k for k, c in enumerate(shared[j]) if c not in shared[i]]
            for side, change in (("u", "a_u"), ("v", "a_v")):
                assert float((params[j][side][:, only].mT @ params[i][change]).abs().max()) < 1e-9
        assert after[2].layers[layer].terms[0] is before[2].layers[layer].terms[0] or torch.equal(
            params[2]["up"], before[2].layers[layer].terms[0].params["up"]
        )
        old = before[0].layers[layer].terms[0].params
        off = torch.stack([*params[1]["u"].unbind(1), params[3]["u"][:, 1]], 1)
        expected = old["a_u"] - off @ torch.linalg.pinv(off) @ old["a_u"]
        assert torch.allclose(params[0]["a_u"], expected)
    option = fuse(before[:2], options=FusionOptions(separate_columns=True)).adapter
    by_hand = fuse(separated(before[:2])).adapter
    assert torch.equal(dense(option, "unet.a"), dense(by_hand, "unet.a"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistics": None}, r"'closed-form' needs statistics .* choose one of sum, average, spectral"),
        ({"statistics": []}, "statistics of 0 concepts for 3 adapters"),
        ({"options": lambda: FusionOptions(ridge=-1.0)}, r"ridge -1\.0: expected"),
        ({"options": lambda: FusionOptions(iterations=0)}, "iterations 0: expected"),
    ],
)
def test_refused(change, message):
    adapters, x = case()
    arguments = {"statistics": [gathered(adapters, part) for part in x]} | change
    with pytest.raises(SpectralAdapterError, match=message):
        if callable(arguments.get("options")):
            arguments["options"] = arguments["options"]()
        fuse(adapters, "closed-form", **arguments)


def test_statistics_of_different_rank_spaces_are_refused():
    adapters, x = case()
    given = [gathered(adapters, x[0], "rank"), *(gathered(adapters[::-1], part, "rank") for part in x[1:])]
    with pytest.raises(SpectralAdapterError, match=r"unet\.a: statistics in different rank spaces"):
        fuse(adapters, "closed-form-rank", statistics=given)
    live = [adapter(GATED, 4), adapter(FouRAConfig(2, gate="none"), 5)]
    bare = [{n: Statistics.of(v) for n, v in part.items()} for part in x[:2]]
    with pytest.raises(SpectralAdapterError, match=r"unet\.a: an adaptive gate has no fixed ΔW"):
        fuse(live, "closed-form", statistics=bare)


def test_moments_that_float32_has_rounded_can_be_compressed_on():
    """Few tokens far from the origin: their sums have eigenvalues below zero, beyond 1e-6 of the mean one."""
    shape = LayerShape(8, 400)
    tokens = 5 + draw(1, 50, 400).float()
    moment = tokens.mT @ tokens / 50
    assert float(torch.linalg.eigvalsh(moment.double())[0]) < -1e-6 * float(moment.diagonal().mean())
    made = []
    for seed in (2, 3):
        params = {"down": draw(seed, 3, 400), "up": draw(seed + 10, 8, 3)}
        made.append(Adapter({"unet.a": AdapterLayer(shape, (Term(LoRAConfig(3), params),))}))
    statistics = [{"unet.a": Statistics(moment, 50)}] * 2
    fused = fuse(made, "average", rank=2, statistics=statistics)
    assert fused.adapter.layers["unet.a"].factors().rank == 2 and 0 < fused.report.error < 1
