"""The contract of every method on every kind of layer, against the papers' dense formulas in float64.

The oracles below are written from the formulas alone: whole matrices, no low-rank factors, nothing imported
from the code under test but its configurations. Parameters are moved off zero, so that no term can hide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_core.attach.targets import layer_problem
from spectral_core.errors import SpectralAdapterError
from spectral_core.maths import lowrank, transforms
from spectral_core.maths.layers import Geometry, LayerShape, expand, project
from spectral_core.methods import (
    Fold,
    FouRAConfig,
    LoRAConfig,
    MethodConfig,
    OrthogonalConfig,
    SpectralAConfig,
    SpectralRConfig,
    config_from_dict,
    config_to_dict,
    fold_many,
    foura,
    method_of,
    orthogonal,
    spectral_a,
    spectral_r,
)
from tests.core.maths.test_transforms import definition

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tall": (lambda: nn.Linear(6, 11), (2, 5, 6)),
    "wide": (lambda: nn.Linear(14, 5), (3, 14)),
    "odd": (lambda: nn.Linear(9, 7), (2, 3, 2, 9)),
    "one in": (lambda: nn.Linear(1, 4), (2, 3, 1)),
    "one out": (lambda: nn.Linear(5, 1), (2, 3, 5)),
    "conv 3x3": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 7)),
    "conv 1x1": (lambda: nn.Conv2d(7, 5, 1), (2, 7, 4, 4)),
    "conv 5x3": (
        lambda: nn.Conv2d(4, 9, (5, 3), dilation=(1, 2), padding=(3, 1), padding_mode="circular"),
        (2, 4, 9, 8),
    ),
    "conv same": (lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (1, 3, 6, 5)),
    "conv 1d": (lambda: nn.Conv1d(5, 6, 3, padding=1), (2, 5, 8)),
    "conv 3d": (lambda: nn.Conv3d(3, 4, (1, 2, 3), stride=(1, 2, 1)), (2, 3, 3, 4, 5)),
}

CONFIGS: dict[str, Callable[[int], MethodConfig]] = {
    "lora": lambda r: LoRAConfig(r),
    "lora alpha": lambda r: LoRAConfig(r, alpha=2.5),
    "orthogonal": lambda r: OrthogonalConfig(r, alpha=2.0, seed=3),
    "foura dct": lambda r: FouRAConfig(r, gate="none"),
    "foura dct alpha": lambda r: FouRAConfig(r, alpha=0.7, gate="none"),
    "foura dct frozen": lambda r: FouRAConfig(r, gate="frozen"),
    "foura dft": lambda r: FouRAConfig(r, transform="dft", gate="none"),
    "foura dft frozen": lambda r: FouRAConfig(r, alpha=3.0, transform="dft", gate="frozen"),
    "foura none": lambda r: FouRAConfig(r, transform="none", gate="none"),
    "foura none frozen": lambda r: FouRAConfig(r, transform="none", gate="frozen"),
    "spectral a": lambda r: SpectralAConfig(tuple(range(r))),
    "spectral a last": lambda r: SpectralAConfig((r - 1,)),
    "spectral a scale": lambda r: SpectralAConfig(tuple(reversed(range(r))), train_scale=True),
    "spectral r": lambda r: SpectralRConfig(tuple(range(r))),
    "spectral r scale": lambda r: SpectralRConfig(tuple(range(r)), train_scale=True),
    "spectral r rotation": lambda r: SpectralRConfig(tuple(range(r)), strength_law="rotation"),
    "spectral r both": lambda r: SpectralRConfig(tuple(range(r)), train_scale=True, strength_law="rotation"),
}

every_layer = pytest.mark.parametrize("layer", LAYERS)
every_config = pytest.mark.parametrize("config", CONFIGS)


@dataclass
class Case:
    """A layer with an adapter on it, everything in float64 and away from zero."""

    module: nn.Module
    x: Tensor
    shape: LayerShape
    config: MethodConfig
    params: dict[str, Tensor]

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def delta(self, strength: float = 1.0, params: Mapping[str, Tensor] | None = None) -> Tensor:
        params = self.params if params is None else params
        return lowrank.delta(method_of(self.config).fold(self.config, self.shape, params, strength))


def make(layer: str, config: str, seed: int = 0, moved: bool = True) -> Case:
    torch.manual_seed(seed)
    build, x_shape = LAYERS[layer]
    module = build().double()
    shape = LayerShape.of(module.weight)  # type: ignore[arg-type]
    chosen = CONFIGS[config](min(3, shape.max_rank))
    method = method_of(chosen)
    basis = None
    if method.needs_basis:
        u, s, vh = torch.linalg.svd(module.weight.detach().flatten(1), full_matrices=False)  # type: ignore[operator, union-attr]
        columns = list(chosen.columns)  # type: ignore[union-attr]
        basis = (u[:, columns], s[columns], vh[columns].mT)
    generator = torch.Generator().manual_seed(seed)
    params = {k: v.double() for k, v in method.init(chosen, shape, basis, generator).items()}
    if basis is not None:
        params |= dict(zip(("u", "s", "v"), basis, strict=True))  # init keeps float32
    if moved:
        for name in method.trainable(chosen):
            params[name] = params[name] + 0.4 * torch.randn_like(params[name])
        if "gate.mask" in params:
            params["gate.mask"] = (torch.arange(chosen.rank) % 2 == 0).double()
    return Case(module, torch.randn(x_shape, dtype=torch.float64), shape, chosen, params)


# --- the oracles ----------------------------------------------------------------------------------


def dct_by_definition(n: int) -> Tensor:
    rows = [
        [
            math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * (2 * j + 1) * k / (2 * n))
            for j in range(n)
        ]
        for k in range(n)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def transform_matrix(transform: str, n: int) -> Tensor:
    """F (n, n), unitary, complex128."""
    if transform == "dct":
        return dct_by_definition(n).cdouble()
    if transform == "dft":
        jk = torch.arange(n, dtype=torch.float64)[:, None] * torch.arange(n, dtype=torch.float64)
        return torch.polar(torch.full_like(jk, n**-0.5), -2 * math.pi * jk / n)
    return torch.eye(n, dtype=torch.complex128)


def rotation_by_definition(entries: Tensor, r: int, angle: float) -> Tensor:
    """R = (I + Q)(I − Q)⁻¹, Q = angle · (A − Aᵀ)/2 with 2·entries above A's diagonal; several at once."""
    if entries.dim() > 1:
        return torch.stack([rotation_by_definition(one, r, angle) for one in entries])
    a = torch.zeros(r, r, dtype=torch.float64)
    row, column = torch.triu_indices(r, r, 1)
    a = a.index_put((row, column), 2 * entries)
    q = angle * (a - a.mT) / 2
    eye = torch.eye(r, dtype=torch.float64)
    return (eye + q) @ torch.linalg.inv(eye - q)


def dense(case: Case, strength: float, params: Mapping[str, Tensor] | None = None) -> Tensor:
    """strength · ΔW by the papers' formulas, (out, in, *kernel)."""
    config, p = case.config, case.params if params is None else params
    if isinstance(config, LoRAConfig | OrthogonalConfig):
        alpha = config.rank if config.alpha is None else config.alpha
        return strength * alpha / config.rank * torch.einsum("or,r...->o...", p["up"], p["down"])
    if isinstance(config, FouRAConfig):
        into = transform_matrix(config.transform, case.shape.in_features)
        back = transform_matrix(config.transform, case.shape.out_features).mH
        mask = p["gate.mask"] if config.gate == "frozen" else torch.ones(config.rank)
        alpha = config.rank if config.alpha is None else config.alpha
        gated = (p["b"] * mask * alpha / config.rank).cdouble()
        # W·x sums over the input channels c: (A F)[r, j] = Σ_c A[r, c] F[c, j]
        update = torch.einsum("om,mr,rc...,cj->oj...", back, gated, p["a"].cdouble(), into)
        return strength * update.real
    u, s, v = p["u"], p["s"], p["v"]
    old = (u * s) @ v.mT
    if isinstance(config, SpectralAConfig):
        scaled = s + p["a_s"] if config.train_scale else s
        change = strength * (((u + p["a_u"]) * scaled) @ (v + p["a_v"]).mT - old)
    else:
        assert isinstance(config, SpectralRConfig)
        rotation = config.strength_law == "rotation"
        angle = strength if rotation else 1.0
        r_u, r_v = (rotation_by_definition(p[q], config.rank, angle) for q in ("q_u", "q_v"))
        scaled = s * (1 + angle * p["s_scale"]) if config.train_scale else s
        change = (1.0 if rotation else strength) * ((u @ r_u * scaled) @ (v @ r_v).mT - old)
    return change.reshape(case.shape.weight_shape)


def matches_oracle(case: Case, strength: float = 1.0) -> bool:
    return torch.allclose(case.delta(strength), dense(case, strength), rtol=1e-9, atol=1e-11)


# --- the contract ---------------------------------------------------------------------------------


@every_layer
@every_config
def test_delta_is_the_formula_at_any_strength(layer: str, config: str) -> None:
    for strength in (1.0, -0.7, 0.25):
        case = make(layer, config)
        assert matches_oracle(case, strength)
    assert case.delta().abs().max() > 1e-3 or "rotation" in config or config == "spectral r"


@every_layer
@every_config
def test_forward_path_is_the_merged_weight(layer: str, config: str) -> None:
    case = make(layer, config)
    factors = method_of(case.config).fold(case.config, case.shape, case.params, 0.8)
    is_convolution = bool(case.shape.kernel)
    z = project(case.x, factors.down, Geometry.of(case.module))
    path = case.module(case.x) + expand(z, factors.scaled_up(), is_convolution)
    with torch.no_grad():
        case.module.weight.add_(dense(case, 0.8))  # type: ignore[operator, union-attr]
    assert torch.allclose(path, case.module(case.x), rtol=1e-9, atol=1e-10)


@every_layer
@every_config
def test_gradients_are_the_formulas(layer: str, config: str) -> None:
    case = make(layer, config)
    names = [n for n in method_of(case.config).trainable(case.config) if case.params[n].numel()]
    if not names:  # a rotation of one column has no angle
        assert case.config.rank == 1 and isinstance(case.config, SpectralRConfig)
        return
    leaves = {n: case.params[n].clone().requires_grad_() for n in names}
    direction = torch.randn(case.shape.weight_shape, dtype=torch.float64)
    ours = torch.autograd.grad((case.delta(0.8, case.params | leaves) * direction).sum(), leaves.values())
    theirs = torch.autograd.grad((dense(case, 0.8, case.params | leaves) * direction).sum(), leaves.values())
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10), name
        assert one.abs().max() > 0, f"no gradient reaches {name}"


@every_layer
@every_config
def test_starts_as_nothing_at_all(layer: str, config: str) -> None:
    """Zero to the bit: an inexact basis or a rounded one must not move the base model either."""
    case = make(layer, config, moved=False)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        params = {k: v.to(dtype) for k, v in case.params.items()}
        factors = method_of(case.config).fold(case.config, case.shape, params, 1.3)
        assert not lowrank.delta(factors).any()
        z = project(case.x.to(factors.down.dtype), factors.down, Geometry.of(case.module))
        assert not expand(z, factors.scaled_up(), bool(case.shape.kernel)).any()


@every_layer
@every_config
def test_tensors_are_the_declared_ones(layer: str, config: str) -> None:
    case = make(layer, config, moved=False)
    method = method_of(case.config)
    assert {k: tuple(v.shape) for k, v in case.params.items()} == method.tensor_shapes(
        case.config, case.shape
    )
    assert set(method.trainable(case.config)) <= set(case.params)
    assert case.config.adaptive_gate is None
    again = config_from_dict(config_to_dict(case.config))
    assert again == case.config


@every_config
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors_fold_in_float32(config: str, dtype: torch.dtype) -> None:
    for layer in ("odd", "conv 3x3"):
        case = make(layer, config)
        half = {k: v.to(dtype) for k, v in case.params.items()}
        factors = method_of(case.config).fold(case.config, case.shape, half, 0.8)
        assert factors.down.dtype == factors.up.dtype == torch.float32
        exact = dense(case, 0.8, {k: v.double() for k, v in half.items()})
        assert torch.allclose(lowrank.delta(factors).double(), exact, rtol=1e-4, atol=2e-6)
        with torch.autocast("cpu", torch.bfloat16):
            automatic = method_of(case.config).fold(case.config, case.shape, half, 0.8)
        assert torch.equal(automatic.up, factors.up) and torch.equal(automatic.down, factors.down)


# --- FouRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["tall", "odd", "wide", "conv 3x3", "conv 1d"])
@pytest.mark.parametrize("config", ["foura dct", "foura dft", "foura dft frozen"])
def test_foura_on_the_activations(layer: str, config: str) -> None:
    """The paper's own order: transform the activation, project, gate, project, transform back, real part."""
    case = make(layer, config)
    chosen, p = case.config, case.params
    assert isinstance(chosen, FouRAConfig)
    axis = 1 if case.shape.kernel else -1

    def into(x: Tensor) -> Tensor:
        if chosen.transform == "dft":
            return torch.fft.fft(x, dim=axis, norm="ortho")
        return torch.movedim(x.movedim(axis, -1) @ dct_by_definition(x.shape[axis]).mT, -1, axis).cdouble()

    def back(x: Tensor) -> Tensor:
        if chosen.transform == "dft":
            return torch.fft.ifft(x, dim=axis, norm="ortho").real
        return torch.movedim(x.real.movedim(axis, -1) @ dct_by_definition(x.shape[axis]), -1, axis)

    # the layer's padding is zeros, which a transform over the channels keeps
    x = into(case.x)
    geometry = Geometry.of(case.module)
    z = torch.complex(project(x.real, p["a"], geometry), project(x.imag, p["a"], geometry))
    b = p["b"] * p.get("gate.mask", torch.ones(chosen.rank)) * chosen.scale
    out = [expand(part, b, bool(case.shape.kernel)) for part in (z.real.contiguous(), z.imag.contiguous())]
    wanted = back(torch.complex(*out))
    factors = foura.fold(chosen, case.shape, p, 1.0)
    ours = expand(project(case.x, factors.down, geometry), factors.scaled_up(), bool(case.shape.kernel))
    assert torch.allclose(ours, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layer", ["tall", "odd", "wide"])
def test_dft_operators_commute_with_reversal(layer: str) -> None:
    case = make(layer, "foura dft")
    update = case.delta()
    flipped = update[-torch.arange(update.shape[0]) % update.shape[0]][
        :, -torch.arange(update.shape[1]) % update.shape[1]
    ]
    assert torch.allclose(update, flipped, atol=1e-12)
    dct = make(layer, "foura dct").delta()
    assert not torch.allclose(dct, dct.flip(0, 1), atol=1e-3)


@pytest.mark.parametrize(
    ("config", "rows", "rank"),  # of rank 3 on 11×6; 6 dimensions hold 4 even and 2 odd functions for the DFT
    [
        ("lora", 3, 3),
        ("foura dct", 3, 3),
        ("foura dft", 6, 5),
        ("foura none", 3, 3),
        ("spectral a", 6, 6),
        ("spectral r", 3, 3),
    ],
)
def test_ranks(config: str, rows: int, rank: int) -> None:
    case = make("tall", config)
    factors = method_of(case.config).fold(case.config, case.shape, case.params, 1.0)
    assert factors.rank == rows
    assert torch.linalg.matrix_rank(case.delta()) == rank


@pytest.mark.parametrize("transform", transforms.TRANSFORMS)
def test_freezing_keeps_the_gates_that_were_open(transform: str) -> None:
    shape = LayerShape(7, 9)
    config = FouRAConfig(5, transform=transform)
    assert config.adaptive_gate is not None
    params = foura.init(config, shape, None, torch.Generator().manual_seed(0))
    params["b"] = torch.randn(7, 5)
    params["gate.mean_open"] = torch.tensor([0.9, 0.1, 0.51, 0.5, 1.0])
    frozen, kept = foura.freeze(config, params)
    assert frozen.gate == "frozen" and frozen.adaptive_gate is None
    assert {k: tuple(v.shape) for k, v in kept.items()} == foura.tensor_shapes(frozen, shape)
    factors = foura.fold(frozen, shape, kept)
    assert factors.rank == 3 * config.rows_per_gate
    open_only = {"a": params["a"], "b": params["b"] * torch.tensor([1.0, 0, 1, 0, 1])}
    wanted = lowrank.delta(foura.fold(FouRAConfig(5, transform=transform, gate="none"), shape, open_only))
    assert torch.allclose(lowrank.delta(factors), wanted, atol=1e-5)
    plain = FouRAConfig(5, gate="none")
    assert foura.freeze(plain, params)[0] is plain


def test_a_gate_frozen_shut_adds_nothing() -> None:
    case = make("tall", "foura dct frozen")
    case.params["gate.mask"] = torch.zeros(3, dtype=torch.float64)
    factors = foura.fold(case.config, case.shape, case.params)  # type: ignore[arg-type]
    assert factors.rank == 0
    assert torch.equal(case.delta(), torch.zeros(11, 6, dtype=torch.float64))
    assert not expand(project(case.x, factors.down, Geometry()), factors.up, False).any()


# --- Spectral Adapter -----------------------------------------------------------------------------


def test_rotation_keeps_the_singular_values() -> None:
    for law in ("spectral r", "spectral r rotation"):
        for layer in ("tall", "wide", "conv 3x3"):
            case = make(layer, law)
            strength = 1.7 if "rotation" in law else 1.0
            changed = (case.weight + case.delta(strength)).flatten(1)
            assert torch.allclose(
                torch.linalg.svdvals(changed), torch.linalg.svdvals(case.weight.flatten(1)), atol=1e-12
            )
            assert not torch.allclose(changed, case.weight.flatten(1), atol=1e-2)


def test_small_updates_survive_bfloat16() -> None:
    """|A| = 1e-5 beside singular vectors: the delta form keeps it, a difference of products loses it."""
    torch.manual_seed(0)
    shape = LayerShape(64, 48)
    u, s, vh = torch.linalg.svd(torch.randn(64, 48, dtype=torch.float64), full_matrices=False)
    config = SpectralAConfig(tuple(range(8)))
    exact = {"u": u[:, :8], "s": s[:8], "v": vh[:8].mT}
    exact |= {"a_u": 1e-5 * torch.randn(64, 8).double(), "a_v": 1e-5 * torch.randn(48, 8).double()}
    wanted = (exact["u"] + exact["a_u"]) * exact["s"] @ (exact["v"] + exact["a_v"]).mT
    wanted = wanted - (exact["u"] * exact["s"]) @ exact["v"].mT

    def error(found: Tensor) -> float:
        return float((found.double() - wanted).norm() / wanted.norm())

    factors = spectral_a.fold(config, shape, exact)
    cast = lowrank.Factors(factors.down.bfloat16(), factors.up.bfloat16())
    assert error(cast.up.double() @ cast.down.double()) < 0.01
    half = {k: v.bfloat16() for k, v in exact.items()}
    naive_down = (half["v"] + half["a_v"]) * half["s"] - half["v"] * half["s"]
    naive = (half["a_u"].double() * half["s"].double()) @ (half["v"] + half["a_v"]).double().mT
    assert error(naive + half["u"].double() @ naive_down.double().mT) > 0.3


def test_small_rotations_keep_their_digits() -> None:
    case = make("tall", "spectral r")
    small = {k: 1e-6 * v if k.startswith("q_") else v for k, v in case.params.items()}
    exact = case.delta(params=small)
    found = case.delta(params={k: v.float() for k, v in small.items()})
    assert (found - exact).norm() / exact.norm() < 1e-5


# --- a wrong formula must fail --------------------------------------------------------------------


def _spectral_a_without(term: str) -> Callable[..., lowrank.Factors]:
    def fold(config: SpectralAConfig, shape: LayerShape, p: Mapping[str, Tensor], strength: float = 1.0):
        c = p["a_s"] if config.train_scale else torch.zeros_like(p["s"])
        s = p["s"] + c
        first = p["v"] if term == "cross" else p["v"] + p["a_v"]
        second = p["a_v"] * s + (0 if term == "scale" else p["v"] * c)
        sign = -1 if term == "sign" else 1
        down = torch.cat([first, sign * second], 1).mT.reshape(-1, shape.in_features, *shape.kernel)
        return lowrank.Factors(down, torch.cat([p["a_u"] * s, p["u"]], 1), strength)

    return fold


def _wrong_transform(kind: str) -> Callable[..., list[Tensor]]:
    def right(x: Tensor, transform: str, dim: int) -> Tensor:
        return every([(x, dim)], transform)[0]

    every = transforms.fold_many

    def fold(x: Tensor, transform: str, dim: int) -> Tensor:
        if kind == "direction":
            return torch.tensordot(definition(x.shape[dim]).to(x), x, ([1], [dim])).movedim(0, dim)
        if kind == "imaginary sign":  # of the up projection alone: of both it would cancel
            good = right(x, transform, dim)
            real, imaginary = good.chunk(2, 1 - dim)
            return torch.cat([real, -imaginary], 1) if dim == 0 else good
        if kind == "other":
            return right(x, "dct" if transform == "dft" else "none", dim)
        return right(x, transform, dim) * x.shape[dim] ** 0.5

    return lambda factors, transform: [fold(x, transform, dim) for x, dim in factors]


MUTATIONS: dict[str, tuple[str, object, str, object]] = {
    "no mutation": ("foura dct", transforms, "TRANSFORMS", transforms.TRANSFORMS),
    "dct for its inverse": ("foura dct", transforms, "fold_many", _wrong_transform("direction")),
    "no dct": ("foura dct", transforms, "fold_many", _wrong_transform("other")),
    "dct for dft": ("foura dft", transforms, "fold_many", _wrong_transform("other")),
    "sign of the imaginary part": ("foura dft", transforms, "fold_many", _wrong_transform("imaginary sign")),
    "not orthonormal": ("foura dft", transforms, "fold_many", _wrong_transform("norm")),
    "alpha lost": ("foura dct alpha", FouRAConfig, "scale", 1.0),
    "lora's alpha lost": ("lora alpha", LoRAConfig, "scale", 1.0),
    "mask ignored": ("foura dct frozen", torch.Tensor, "__gt__", lambda a, b: torch.ones_like(a).bool()),
    "cross term lost": ("spectral a", spectral_a, "fold", _spectral_a_without("cross")),
    "sign of A_V": ("spectral a", spectral_a, "fold", _spectral_a_without("sign")),
    "V·C lost": ("spectral a scale", spectral_a, "fold", _spectral_a_without("scale")),
    "first-order rotation": (
        "spectral r",
        spectral_r,
        "cayley_minus_identity",
        lambda q, r: 2 * (rotation_by_definition(q, r, 1e-7) - torch.eye(r).double()) / 2e-7,
    ),
    "rotation the other way": (
        "spectral r",
        spectral_r,
        "cayley_minus_identity",
        lambda q, r: rotation_by_definition(q, r, -1.0) - torch.eye(r).double(),
    ),
    "identity kept": ("spectral r", spectral_r, "cayley_minus_identity", rotation_by_definition),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_formula_is_noticed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, owner, name, wrong = MUTATIONS[mutation]
    case = make("tall", config)
    if name == "cayley_minus_identity" and mutation == "identity kept":
        wrong = lambda q, r: rotation_by_definition(q, r, 1.0)  # noqa: E731
    monkeypatch.setattr(owner, name, wrong)
    if owner is spectral_a:  # the table of methods holds the function itself
        found = lowrank.delta(spectral_a.fold(case.config, case.shape, case.params))  # type: ignore[arg-type]
    else:
        found = case.delta()
    monkeypatch.undo()
    assert torch.allclose(found, dense(case, 1.0), rtol=1e-9, atol=1e-11) == (mutation == "no mutation")


def test_many_folds_are_each_alone_and_in_their_places() -> None:
    """Of all methods mixed, in layers of several shapes, with strengths of their own."""
    layers = ("tall", "wide", "conv 3x3")
    cases = [make(layer, config, seed) for seed, config in enumerate(CONFIGS) for layer in layers]
    cases = cases[::2] + cases[1::2]
    strengths = [0.5 + 0.1 * (i % 7) for i in range(len(cases))]
    folds = [Fold(c.config, c.shape, c.params, s) for c, s in zip(cases, strengths, strict=True)]
    for found, case, strength in zip(fold_many(folds), cases, strengths, strict=True):
        alone = method_of(case.config).fold(case.config, case.shape, case.params, strength)
        assert found.shape == alone.shape and found.scale == alone.scale
        assert torch.allclose(lowrank.delta(found), lowrank.delta(alone), rtol=1e-9, atol=1e-12)


# --- configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"method": "dora", "rank": 4}, "unknown method"),
        ({"rank": 4}, "unknown method"),
        ({"method": "foura", "rank": 0}, "rank"),
        ({"method": "foura", "rank": True}, "rank"),
        ({"method": "foura", "rank": 2.0}, "rank"),
        ({"method": "foura", "rank": 4, "alpha": math.nan}, "alpha"),
        ({"method": "foura", "rank": 4, "transform": "dst"}, "transform"),
        ({"method": "foura", "rank": 4, "gate": "on"}, "gate"),
        ({"method": "foura", "rank": 4, "gate_kind": "cnn"}, "gate_kind"),
        ({"method": "foura", "rank": 4, "gate_budget": 1.5}, "gate_budget"),
        ({"method": "foura", "rank": 4, "gate_budget": True}, "gate_budget"),
        ({"method": "foura", "rank": 4, "gate_budget": math.nan}, "gate_budget"),
        ({"method": "foura", "rank": 4, "colour": 1}, "colour"),
        ({"method": "lora"}, "incomplete"),
        ({"method": "lora", "rank": "8"}, "rank"),
        ({"method": "spectral_a", "columns": []}, "columns"),
        ({"method": "spectral_a", "columns": [0, 0]}, "columns"),
        ({"method": "spectral_a", "columns": [-1]}, "columns"),
        ({"method": "spectral_a", "columns": 3}, "columns"),
        ({"method": "spectral_r", "columns": [0], "strength_law": "power"}, "strength_law"),
    ],
)
def test_bad_configurations_are_refused(values: dict[str, object], word: str) -> None:
    with pytest.raises(SpectralAdapterError, match=word):
        config_from_dict(values)


def test_spectral_methods_need_their_basis() -> None:
    for config in (SpectralAConfig((0,)), SpectralRConfig((0,))):
        with pytest.raises(SpectralAdapterError, match="singular columns"):
            method_of(config).init(config, LayerShape(4, 4), None, None)


@pytest.mark.parametrize("config", [SpectralAConfig((0, 1, 2)), SpectralRConfig((0, 1, 2))])
def test_a_basis_of_another_size_is_refused(config: SpectralAConfig | SpectralRConfig) -> None:
    u, s, v = torch.randn(5, 3), torch.ones(3), torch.randn(4, 3)
    assert method_of(config).init(config, LayerShape(5, 4), (u, s, v), None)["u"].shape == (5, 3)
    for basis in ((u[:, :2], s, v), (u, s[:2], v), (u, s, v[:3]), (v, s, u)):
        with pytest.raises(SpectralAdapterError, match=r"Spectral [AR]: the basis has . of shape .*expected"):
            method_of(config).init(config, LayerShape(5, 4), basis, None)


def test_layers_that_cannot_be_adapted() -> None:
    assert "groups=2" in str(layer_problem(nn.Conv2d(4, 4, 3, groups=2)))
    assert "transposed" in str(layer_problem(nn.ConvTranspose2d(4, 4, 3)))
    with pytest.raises(SpectralAdapterError, match="cannot be adapted"):
        LayerShape.of(torch.zeros(3))
    assert F.linear(torch.ones(1, 3), torch.ones(2, 3)).shape == (1, 2)


# --- orthogonal adaptation ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [LayerShape(5, 12), LayerShape(4, 3, (3, 3)), LayerShape(2, 7)], ids=str)
def test_blocks_of_one_seed_are_the_rows_of_one_orthogonal_matrix(shape: LayerShape) -> None:
    blocks = shape.fan_in // 2
    rows = [
        orthogonal.init(OrthogonalConfig(2, block=k, seed=9), shape, None, None)["down"].flatten(1)
        for k in range(blocks)
    ]
    stacked = torch.cat(rows).double()
    assert torch.allclose(stacked @ stacked.mT, torch.eye(2 * blocks, dtype=torch.float64), atol=1e-6)
    other = orthogonal.init(OrthogonalConfig(2, seed=10), shape, None, None)["down"].flatten(1)
    assert (rows[0] @ other.mT).abs().max() > 1e-3, "another seed is another matrix"
    with pytest.raises(SpectralAdapterError, match=f"room for {blocks} blocks"):
        orthogonal.init(OrthogonalConfig(2, block=blocks, seed=9), shape, None, None)


def test_orthogonal_rows_are_frozen() -> None:
    """Adapters trained in different places meet only if this never changes."""
    order, signs = [0, 6, 3], [-1, 1, -1, 1, -1, -1, -1, -1]
    expected = dct_by_definition(8)[order] * torch.tensor(signs, dtype=torch.float64)
    assert torch.allclose(orthogonal.orthogonal_rows(8, 2, 5, seed=7), expected, atol=1e-12)
    with pytest.raises(SpectralAdapterError, match=r"block -1 for method orthogonal"):
        OrthogonalConfig(2, block=-1)
