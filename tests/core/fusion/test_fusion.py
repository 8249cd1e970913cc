"""Fusion against dense formulas in float64: every pair of methods, strengths, compression, lineage."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_core.adapter.adapter import Adapter, AdapterLayer, Provenance, Term
from spectral_core.adapter.fingerprint import fingerprint
from spectral_core.adapter.schedule import Schedule
from spectral_core.errors import SpectralAdapterError
from spectral_core.fusion import FUSIONS, freeze, fuse, recompress, rename_token
from spectral_core.maths.cayley import cayley_minus_identity
from spectral_core.maths.layers import LayerShape
from spectral_core.maths.lowrank import delta
from spectral_core.methods import FouRAConfig, LoRAConfig, SpectralAConfig, SpectralRConfig, method_of

LINEAR = LayerShape(13, 18)
CONV = LayerShape(11, 6, (3, 3))
SHAPES = {"unet.a.to_q": LINEAR, "unet.conv": CONV, "text_encoder.mlp": LayerShape(20, 9)}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight_of(shape: LayerShape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape.weight_shape, generator=generator(seed), dtype=torch.float64)


def basis_of(shape, columns, base=0):
    u, s, vh = torch.linalg.svd(weight_of(shape, base).flatten(1), full_matrices=False)
    at = list(columns)
    return u[:, at], s[at], vh.mT[:, at]


def term(config, shape: LayerShape, seed: int, base: int = 0, weight: float = 1.0) -> Term:
    """Random, non-zero float64 tensors for every trained one, the true basis for spectral methods."""
    gen = generator(seed)
    basis = basis_of(shape, config.columns, base) if method_of(config).needs_basis else None
    params = {}
    for name, size in method_of(config).tensor_shapes(config, shape).items():
        params[name] = 0.3 * torch.randn(size, generator=gen, dtype=torch.float64)
        if name == "gate.mask":
            params[name] = torch.tensor([1.0, 0.0, 1.0, 0.0][: size[0]])
        if name == "gate.mean_open":
            params[name] = torch.tensor([0.9, 0.2, 0.7, 0.4][: size[0]])
    if basis is not None:
        params |= dict(zip("usv", basis, strict=True))
    return Term(config, params, weight)


def adapter(config, seed: int, name: str = "", base: int = 0, shapes=SHAPES, **fields) -> Adapter:
    layers = {
        layer: AdapterLayer(shape, (term(config, shape, seed + i, base),))
        for i, (layer, shape) in enumerate(shapes.items())
    }
    return Adapter(layers, Provenance(name=name), **fields)


CONFIGS = {
    "lora": LoRAConfig(3, alpha=1.5),
    "dct": FouRAConfig(4, alpha=2.0, transform="dct", gate="none"),
    "dft": FouRAConfig(3, transform="dft", gate="frozen"),
    "adaptive": FouRAConfig(4, transform="dct", gate="adaptive"),
    "spectral_a": SpectralAConfig((0, 1)),
    "spectral_a_scale": SpectralAConfig((2, 3), train_scale=True),
    "spectral_r": SpectralRConfig((4, 5)),
    "spectral_r_scale": SpectralRConfig((1, 2), train_scale=True),
    "spectral_r_rotation": SpectralRConfig((2, 4), train_scale=True, strength_law="rotation"),
}
FIXED = [name for name in CONFIGS if name != "adaptive"]
SPECTRAL = [name for name in CONFIGS if name.startswith("spectral")]


def dense(adapted: Adapter, layer: str, strength: float = 1.0) -> torch.Tensor:
    """ΔW of a layer at the adapter's strengths; a missing layer is 0."""
    if layer not in adapted.layers:
        return torch.zeros(SHAPES[layer].weight_shape, dtype=torch.float64)
    return delta(adapted.layers[layer].factors(adapted.strength_of(layer) * strength))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> bool:
    assert float(expected.norm()) > 0 or float(actual.norm()) == 0
    return float((actual - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-300)


def snapshot(adapters):
    return [a.content_hash for a in adapters]


@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(FIXED, 2)), ids="+".join)
@pytest.mark.parametrize("method", ["sum", "average"])
def test_linear_fusions_of_every_pair_of_methods(pair, method):
    one = adapter(CONFIGS[pair[0]], 10, strength=1.3, layer_strengths=(("unet.*", 0.5),))
    two = adapter(CONFIGS[pair[1]], 20, strength=-0.7)
    before = snapshot([one, two])
    fused = fuse([one, two], method, weights=[0.8, 2.0]).adapter
    share = 1.0 if method == "sum" else 0.5
    for layer in SHAPES:
        expected = share * (dense(one, layer, 0.8) + dense(two, layer, 2.0))
        assert close(dense(fused, layer), expected)
    assert snapshot([one, two]) == before
    assert fused.strength == 1 and fused.layer_strengths == ()


def paper_formula(shape: LayerShape, concepts, base: int = 0) -> torch.Tensor:
    """(U₀+ΣλᵢUᵢ) S (V₀+ΣλᵢVᵢ)ᵀ − W on the full SVD; concepts are (config, params, λ)."""
    u, s, vh = torch.linalg.svd(weight_of(shape, base).flatten(1), full_matrices=False)
    v = vh.mT
    u_new, s_new, v_new = u.clone(), s.clone(), v.clone()
    for config, params, strength in concepts:
        at = list(config.columns)
        if config.method == "spectral_a":
            u_new[:, at] += strength * params["a_u"]
            v_new[:, at] += strength * params["a_v"]
            s_new[at] += strength * params.get("a_s", torch.zeros(len(at), dtype=torch.float64))
            continue
        rotation = config.strength_law == "rotation"
        angle, scale = (strength, 1.0) if rotation else (1.0, strength)
        u_new[:, at] += scale * u[:, at] @ cayley_minus_identity(params["q_u"] * angle, len(at))
        v_new[:, at] += scale * v[:, at] @ cayley_minus_identity(params["q_v"] * angle, len(at))
        if config.train_scale:
            s_new[at] += strength * s[at] * params["s_scale"]
    return ((u_new * s_new) @ v_new.mT - (u * s) @ v.mT).reshape(shape.weight_shape)


@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(SPECTRAL, 2)), ids="+".join)
def test_spectral_equals_the_dense_paper_formula(pair):
    configs = [CONFIGS[name] for name in pair]
    adapters = [adapter(config, 10 * (i + 1)) for i, config in enumerate(configs)]
    adapters[1] = adapters[1].scaled(0.5).with_layer_strength("unet.*", 3.0)
    weights = [0.7, -1.2]
    result = fuse(adapters, "spectral", weights)
    union = set(configs[0].columns) | set(configs[1].columns)
    for row in result.report.layers:
        shape = SHAPES[row.name]
        concepts = [
            (config, a.layers[row.name].terms[0].params, w * a.strength_of(row.name))
            for config, a, w in zip(configs, adapters, weights, strict=True)
        ]
        assert row.form == "spectral"
        assert row.rank_after <= 2 * len(union)
        assert close(dense(result.adapter, row.name), paper_formula(shape, concepts))


def test_spectral_equals_sum_on_disjoint_columns_and_not_on_shared_ones():
    one, two = adapter(CONFIGS["spectral_a"], 1), adapter(CONFIGS["spectral_a_scale"], 2)
    apart = fuse([one, two], "spectral")
    shared = fuse([one, adapter(CONFIGS["spectral_r_scale"], 3)], "spectral")
    for layer in SHAPES:
        assert close(dense(apart.adapter, layer), dense(one, layer) + dense(two, layer), 1e-12)
    assert all(row.cross_terms < 1e-7 for row in apart.report.layers)
    assert all(row.cross_terms > 1e-2 for row in shared.report.layers)
    assert not apart.report.warnings
    assert "columns 1 in 3 layers" in shared.report.warnings[0]


def test_spectral_keeps_tiny_updates_in_float32():
    def tiny(name, tensor):
        return tensor.float() * (1e-6 if name.startswith("a_") else 1.0)

    def shrunk(a: Adapter) -> Adapter:
        return a.map_terms(lambda _, t: replace(t, params={k: tiny(k, v) for k, v in t.params.items()}))

    one, two = (shrunk(adapter(CONFIGS[n], i)) for i, n in enumerate(("spectral_a", "spectral_a_scale")))
    fused = fuse([one, two], "spectral").adapter
    for layer, shape in SHAPES.items():
        concepts = [
            (t.config, {k: v.double() for k, v in t.params.items()}, 1.0)
            for t in (one.layers[layer].terms[0], two.layers[layer].terms[0])
        ]
        assert close(dense(fused, layer).double(), paper_formula(shape, concepts), 1e-5)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda: adapter(CONFIGS["lora"], 5, "other"), "lora, which has no columns"),
        (lambda: adapter(CONFIGS["spectral_a"], 5, "other", base=9), "column 0 differs"),
        (lambda: adapter(SpectralAConfig((3, 4)), 5, "other", base=9), "not orthonormal"),
    ],
)
def test_spectral_falls_back_to_sum_without_one_basis(spoil, reason):
    one, two = adapter(CONFIGS["spectral_a"], 1, "mine"), spoil()
    result = fuse([one, two], "spectral", [0.5, 2.0])
    for row in result.report.layers:
        assert row.form == "sum" and reason in row.note and row.cross_terms is None
        assert close(dense(result.adapter, row.name), dense(one, row.name, 0.5) + dense(two, row.name, 2.0))
    assert reason in result.report.text


def test_spectral_refuses_singular_values_out_of_order():
    one = adapter(CONFIGS["spectral_a"], 1)
    swapped = adapter(CONFIGS["spectral_r"], 2)
    swapped = swapped.map_terms(lambda _, t: replace(t, params=dict(t.params) | {"s": t.params["s"] * 50}))
    assert all("do not descend" in row.note for row in fuse([one, swapped], "spectral").report.layers)


def test_average_counts_concepts_that_lack_a_layer():
    one, two = adapter(CONFIGS["lora"], 1), adapter(CONFIGS["dct"], 2).only(["text_encoder.*"])
    fused = fuse([one, two], "average").adapter
    assert close(dense(fused, "unet.conv"), 0.5 * dense(one, "unet.conv"))
    assert set(fused.layers) == set(SHAPES)


def test_adaptive_gates_stay_live_with_their_weight():
    live, fixed = adapter(CONFIGS["adaptive"], 1, strength=0.5), adapter(CONFIGS["lora"], 2)
    fused = fuse([live, fixed], weights=[-3.0, 1.0], rank=1)
    for layer in SHAPES:
        kept = [t for t in fused.adapter.layers[layer].terms if not t.mergeable]
        assert len(kept) == 1 and kept[0].weight == -1.5
        assert kept[0].params["a"] is live.layers[layer].terms[0].params["a"]
        assert [t.config.rank for t in fused.adapter.layers[layer].terms if t.mergeable] == [1]
    assert not fused.report.mergeable
    assert all("freeze" in row.note for row in fused.report.layers)


def test_freezing_opens_what_was_open_on_average():
    live = adapter(CONFIGS["adaptive"], 1)
    frozen = fuse([live], freeze_gates=True)
    for layer, shape in SHAPES.items():
        params = live.layers[layer].terms[0].params
        opened = {"a": params["a"][[0, 2]], "b": params["b"][:, [0, 2]]}
        config = FouRAConfig(2, transform="dct", gate="none")
        expected = delta(Term(config, opened).factors(shape))
        assert close(dense(frozen.adapter, layer), expected)
        assert close(dense(freeze(live), layer), expected)
    assert frozen.report.mergeable and not live.mergeable


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_compression_is_the_best_of_its_rank(shape, rank):
    one, two = adapter(CONFIGS["dct"], 1), adapter(CONFIGS["spectral_a"], 2)
    result = fuse([one, two], weights=[1.0, 0.6], rank=rank)
    exact = (dense(one, shape) + dense(two, shape, 0.6)).flatten(1)
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    row = next(r for r in result.report.layers if r.name == shape)
    assert close(dense(result.adapter, shape).flatten(1), best)
    assert row.error == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-9)
    assert row.norm == pytest.approx(float(s.norm()), rel=1e-9)
    assert (row.rank_before, row.rank_after) == (8, rank)


def test_error_budget_takes_the_smallest_rank_that_keeps_it():
    one, two = adapter(CONFIGS["dct"], 1), adapter(CONFIGS["spectral_a"], 2)
    for budget, cap in itertools.product([0.01, 0.2, 0.5], [None, 2]):
        for row in fuse([one, two], error=budget, rank=cap).report.layers:
            s = torch.linalg.svdvals((dense(one, row.name) + dense(two, row.name)).flatten(1))
            fitting = next(k for k in range(1, 99) if s[k:].norm() <= budget * s.norm())
            assert row.rank_after == min(fitting, cap or 99, row.rank_before)
            assert row.error <= budget or row.rank_after == cap


def test_total_error_is_over_all_layers_together():
    result = fuse([adapter(CONFIGS["dct"], 1), adapter(CONFIGS["spectral_a"], 2)], rank=2)
    exact = fuse([adapter(CONFIGS["dct"], 1), adapter(CONFIGS["spectral_a"], 2)]).adapter
    lost = sum(float((dense(result.adapter, n) - dense(exact, n)).square().sum()) for n in SHAPES)
    total = sum(float(dense(exact, n).square().sum()) for n in SHAPES)
    assert result.report.error == pytest.approx((lost / total) ** 0.5, rel=1e-9)


def test_layers_within_the_rank_are_left_alone():
    one = adapter(CONFIGS["spectral_a"], 1)
    result = recompress(one, rank=4)
    assert result.report.error == 0
    after, before = (a.layers["unet.conv"].terms[0].params["a_u"] for a in (result.adapter, one))
    assert after is before


def test_cancelling_concepts_compress_to_nothing():
    one = adapter(CONFIGS["lora"], 1)
    result = fuse([one, one], weights=[1, -1], rank=1)
    for layer in SHAPES:
        assert float(dense(result.adapter, layer).norm()) < 1e-12
    assert result.report.error <= 1


def test_closed_gates_leave_an_empty_but_valid_layer():
    """As a file may say it; freezing keeps the largest gate."""
    closed = adapter(CONFIGS["dft"], 1).map_terms(
        lambda _, t: replace(t, params=dict(t.params) | {"gate.mask": torch.zeros(3)})
    )
    result = fuse([closed], rank=2)
    assert all(row.rank_after == 0 for row in result.report.layers)
    assert float(dense(result.adapter, "unet.conv").norm()) == 0


def test_rotation_law_is_kept_by_sum_and_folded_where_it_must_be():
    turned = adapter(CONFIGS["spectral_r_rotation"], 1, strength=0.6)
    kept, folded = fuse([turned]).adapter, fuse([turned], rank=1)
    for layer in SHAPES:
        assert close(dense(kept, layer, 0.5), dense(turned, layer, 0.5))
        u, s, vh = torch.linalg.svd(dense(turned, layer).flatten(1), full_matrices=False)
        assert close(dense(folded.adapter, layer).flatten(1), s[0] * u[:, :1] @ vh[:1])
    assert all("rotations folded" in row.note for row in folded.report.layers)


def test_weight_zero_drops_the_concept_with_its_words_and_tokens():
    token = {"text_encoder": torch.ones(1, 4)}
    one = adapter(CONFIGS["lora"], 1, "one")
    two = replace(
        adapter(CONFIGS["dct"], 2, "two"), tokens={"<two>": token}, schedule=Schedule.window(0, 0.5)
    ).with_provenance(trigger_words=("two",))
    fused = fuse([one, two], weights=[1, 0])
    assert [c.name for c in fused.report.concepts] == ["one"]
    assert not fused.adapter.tokens and fused.adapter.schedule is None
    assert fused.adapter.provenance.trigger_words == ()
    assert close(dense(fused.adapter, "unet.conv"), dense(one, "unet.conv"))


HALF = Schedule(((0.0, 0.5), (1.0, 1.0)))


@pytest.mark.parametrize(
    ("schedules", "factors", "kept"),
    [
        ((HALF, HALF), (1, 1), HALF),
        ((HALF, Schedule(((0.0, 1.0), (1.0, 2.0)))), (1, 2), HALF),
        ((None, Schedule(((0.3, 0.25),))), (1, 0.25), None),
        ((None, Schedule(((0.0, 1.0), (1.0, 1.0)))), (1, 1), None),
    ],
)
def test_schedules_that_one_adapter_can_hold(schedules, factors, kept):
    bare = [adapter(CONFIGS["lora"], 1), adapter(CONFIGS["dct"], 2)]
    fused = fuse([a.with_schedule(s) for a, s in zip(bare, schedules, strict=True)]).adapter
    assert fused.schedule == kept
    expected = sum(f * dense(a, "unet.conv") for f, a in zip(factors, bare, strict=True))
    assert close(dense(fused, "unet.conv"), expected)


@pytest.mark.parametrize(
    "schedules",
    [(HALF, None), (HALF, Schedule.window(0, 0.5)), (Schedule(((0.0, 1.0), (1.0, 0.5))), HALF)],
)
def test_different_schedules_are_refused_with_a_way_out(schedules):
    adapters = [adapter(CONFIGS["lora"], i, f"c{i}").with_schedule(s) for i, s in enumerate(schedules)]
    with pytest.raises(SpectralAdapterError, match=r"different strength schedules.*with_schedule\(None\)"):
        fuse(adapters)


def test_lineage():
    one = adapter(CONFIGS["lora"], 1, "vase").with_provenance(
        trigger_words=("a", "b"), family="sd1", base={"hash": "x"}
    )
    two = adapter(CONFIGS["dct"], 2, "dog").with_provenance(
        trigger_words=("b", "c"), family="sd1", base={"hash": "y"}
    )
    fused = fuse([one, two], weights=[1.0, 0.5])
    provenance = fused.adapter.provenance
    assert provenance.name == "vase + dog" and provenance.family == "sd1"
    assert provenance.trigger_words == ("a", "b", "c")
    assert [(p["name"], p["weight"], p["content_hash"]) for p in provenance.parents] == [
        ("vase", 1.0, one.content_hash),
        ("dog", 0.5, two.content_hash),
    ]
    assert any("different base models" in w for w in fused.report.warnings)
    assert any("both answer to b" in w for w in fused.report.warnings)
    json.dumps([dict(p) for p in provenance.parents])
    again = fuse([fused.adapter, adapter(CONFIGS["lora"], 3)], name="all").adapter.provenance
    assert again.name == "all" and [p["name"] for p in again.parents[0]["parents"]] == ["vase", "dog"]


def test_base_fingerprints_are_compared_where_they_overlap_and_joined():
    weights = {name: weight_of(shape).float() for name, shape in SHAPES.items()}
    bases = [
        fingerprint({"unet.conv": weights["unet.conv"]}),
        fingerprint({name: weight.half() for name, weight in weights.items()}),
        fingerprint({name: weight_of(shape, 9).float() for name, shape in SHAPES.items()}),
    ]
    adapters = [adapter(CONFIGS["lora"], i, f"c{i}").with_provenance(base=b) for i, b in enumerate(bases)]
    result = fuse(adapters[:2])
    assert not result.report.warnings
    base = result.adapter.provenance.base
    assert set(base["layers"]) == set(SHAPES)
    assert base["layers"]["unet.conv"] == bases[0]["layers"]["unet.conv"]
    mixed = fuse(adapters)
    assert [w.split(" were")[0] for w in mixed.report.warnings] == ["c0 and c2", "c1 and c2"]
    assert mixed.adapter.provenance.base == base


def test_tokens_merge_and_clash():
    def with_token(seed, word, value):
        tokens = {word: {"text_encoder": torch.full((2, 4), value)}}
        return replace(adapter(CONFIGS["lora"], seed, f"c{seed}"), tokens=tokens).with_provenance(
            trigger_words=(f"{word} thing",)
        )

    assert set(fuse([with_token(1, "<a>", 1.0), with_token(2, "<b>", 2.0)]).adapter.tokens) == {"<a>", "<b>"}
    assert set(fuse([with_token(1, "<a>", 1.0), with_token(2, "<a>", 1.0)]).adapter.tokens) == {"<a>"}
    with pytest.raises(SpectralAdapterError, match=r"c1 and c2 both define the token '<a>'.*rename_token"):
        fuse([with_token(1, "<a>", 1.0), with_token(2, "<a>", 2.0)])
    renamed = rename_token(with_token(2, "<a>", 2.0), "<a>", "<z>")
    assert renamed.provenance.trigger_words == ("<z> thing",)
    assert set(fuse([with_token(1, "<a>", 1.0), renamed]).adapter.tokens) == {"<a>", "<z>"}
    with pytest.raises(SpectralAdapterError, match="no token '<q>'"):
        rename_token(renamed, "<q>", "<r>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": []}, "at least one adapter"),
        ({"method": "mean"}, "expected one of sum, average, spectral"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, "expected a finite number"),
        ({"weights": [0, 0]}, "every weight or strength is 0"),
        ({"rank": 0}, "expected a whole number of at least 1"),
        ({"rank": True}, "expected a whole number of at least 1"),
        ({"error": 1.5}, "between 0 and 1"),
        ({"adapters": ["a file"]}, "is a str: expected an adapter"),
    ],
)
def test_refused_settings(arguments, message):
    adapters = [adapter(CONFIGS["lora"], 1), adapter(CONFIGS["lora"], 2)]
    with pytest.raises(SpectralAdapterError, match=message):
        fuse(**({"adapters": adapters} | arguments))


def test_refused_inputs():
    other = adapter(CONFIGS["lora"], 1, "other", shapes={"unet.conv": LINEAR})
    with pytest.raises(SpectralAdapterError, match=r"unet\.conv is 11×6×3×3 in concept 1 and 13×18 in other"):
        fuse([adapter(CONFIGS["lora"], 2), other])
    silent = adapter(CONFIGS["lora"], 1).with_layer_strength("*", 0.0)
    with pytest.raises(SpectralAdapterError, match="no layer is left"):
        fuse([silent])
    with pytest.raises(SpectralAdapterError, match="give a rank, an error"):
        recompress(other)


def test_report_reads_and_serialises():
    adapters = [adapter(CONFIGS["spectral_a"], 1, "vase"), adapter(CONFIGS["spectral_r"], 2, "dog")]
    report = fuse(adapters, "spectral", [1.0, 0.5], rank=2).report
    assert json.loads(json.dumps(report.to_json()))["layers"][0]["form"] == "spectral"
    assert "spectral of vase × 1, dog × 0.5\n3 layers: 3 by spectral\nrank 8 → 2, relative" in report.text
    assert "vase: columns 0–1 in 3 layers" in report.text


def test_equal_names_are_told_apart():
    report = fuse([adapter(CONFIGS["lora"], 1, "x"), adapter(CONFIGS["lora"], 2, "x")]).report
    assert [c.name for c in report.concepts] == ["x (1)", "x (2)"]


NUMBERS = st.floats(-2, 2).filter(lambda x: abs(x) > 1e-3)
LINEAR_LAW = [name for name in FIXED if name != "spectral_r_rotation"]


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.sampled_from(LINEAR_LAW), min_size=1, max_size=4),
    data=st.data(),
    method=st.sampled_from(sorted(n for n, fusion in FUSIONS.items() if not fusion.needs_statistics)),
)
def test_order_does_not_matter_and_linear_fusions_are_homogeneous(names, data, method):
    weights = data.draw(st.lists(NUMBERS, min_size=len(names), max_size=len(names)))
    order = data.draw(st.permutations(range(len(names))))
    scale = data.draw(NUMBERS)
    adapters = [adapter(CONFIGS[name], 7 * i) for i, name in enumerate(names)]
    fused = fuse(adapters, method, weights).adapter
    turned = fuse([adapters[i] for i in order], method, [weights[i] for i in order]).adapter
    scaled = fuse(adapters, method, [w * scale for w in weights]).adapter
    for layer in SHAPES:
        size = sum(float(dense(a, layer, w).norm()) for a, w in zip(adapters, weights, strict=True))
        assert float((dense(fused, layer) - dense(turned, layer)).norm()) <= 1e-12 * size
        if method != "spectral":
            difference = dense(scaled, layer) - scale * dense(fused, layer)
            assert float(difference.norm()) <= 1e-12 * max(size, size * abs(scale))
