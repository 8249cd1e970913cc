"""The Spectral Adapter paper's claims about what columns and rotations can learn, on the style ``poster``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.claims.lab import Lab, Recipe, Task
from benchmarks.claims.measure import StyleMeter
from benchmarks.claims.recipes import COLUMNS, RANK, lora, rotation
from benchmarks.claims.styles import STYLE
from spectral_core.attach.targets import find_targets
from spectral_core.maths.layers import LayerShape
from spectral_core.maths.lowrank import delta
from spectral_core.maths.svd import Columns, select_columns
from spectral_core.methods import FouRAConfig, LoRAConfig, SpectralAConfig, SpectralRConfig, method_of

Cells = list[tuple[str, Callable[[], Mapping[str, Any]]]]
BUDGETS = (rotation(4), rotation(16), rotation(32), lora(1), lora(2), lora(RANK))


def column_cells(lab: Lab) -> Cells:
    """Spectral A in the top, middle, bottom and random columns, beside LoRA of the same size."""
    recipes = [*COLUMNS.values(), lora(RANK)]
    return [
        (f"learned__{recipe.name.replace(' ', '_')}__{seed}", lambda r=recipe, s=seed: _learned(lab, r, s))
        for seed in lab.setting.seeds
        for recipe in recipes
    ]


def budget_cells(lab: Lab) -> Cells:
    """Spectral R and LoRA at several numbers of parameters."""
    return [
        (f"learned__{recipe.name.replace(' ', '_')}__{seed}", lambda r=recipe, s=seed: _learned(lab, r, s))
        for seed in lab.setting.seeds
        for recipe in BUDGETS
    ]


def _learned(lab: Lab, recipe: Recipe, seed: int) -> dict[str, Any]:
    rate = lab.rate("style", recipe)
    run = lab.trained(Task("style", STYLE), recipe, rate, seed)[lab.setting.steps]
    meter = StyleMeter(lab, STYLE)
    read = meter.read(meter.pictures([run.adapter]))
    return read | {
        "held_out": run.held_out,
        "before": run.held_out_before,
        "rate": rate,
        "parameters": run.parameters,
    }


def exact_cells(lab: Lab) -> Cells:
    """What can be computed without training: rank capacity and the singular values under rotation."""
    return [("exact", lambda: {"rank_capacity": _rank_capacity(lab), "rotation": _rotation(lab)})]


def cost_cells(lab: Lab) -> Cells:
    """What gates add to Stable Diffusion 1.5's parameters, counted on its shapes."""
    return [("cost", _cost)]


def _cost() -> dict[str, Any]:
    from benchmarks.speed.unet import sd15_unet

    with torch.device("meta"):
        unet = sd15_unet()
    shapes = [LayerShape.of(w) for w in find_targets(unet, "unet", "attention")[0].values()]
    gates = {}
    for rank in (8, 64):
        config = FouRAConfig(rank)
        method = method_of(config)
        trained = {name for name in method.trainable(config) if name.startswith("gate.")}
        sizes = [method.tensor_shapes(config, shape) for shape in shapes]
        gates[str(rank)] = sum(math.prod(size[name]) for size in sizes for name in trained)
    return {"base": sum(p.numel() for p in unet.parameters()), "gates": gates}


def _weights(lab: Lab) -> dict[str, torch.Tensor]:
    return find_targets(lab.pipe.unet, "unet", lab.setting.targets)[0]


def _rank_capacity(lab: Lab) -> dict[str, Any]:
    """Numerical rank of ΔW with random parameters, the range over all layers where it can be reached."""
    found: dict[str, list[int]] = {"lora": [], "spectral_a": []}
    generator = torch.Generator().manual_seed(0)
    for weight in _weights(lab).values():
        shape = LayerShape.of(weight)
        if min(weight.flatten(1).shape) < 2 * RANK:
            continue
        for config in (LoRAConfig(RANK), SpectralAConfig(tuple(range(RANK)))):
            method = method_of(config)
            basis = None
            if method.needs_basis:
                columns = select_columns(weight, Columns.block(0, RANK))
                basis = columns.u, columns.s, columns.v
            params = method.init(config, shape, basis, generator)
            for name in method.trainable(config):
                params[name] = torch.randn(params[name].shape, generator=generator)
            factors = method.fold(config, shape, params, 1.0)
            found[config.method].append(
                int(torch.linalg.matrix_rank(delta(factors).flatten(1).double(), rtol=1e-6))
            )
    return {name: [min(ranks), max(ranks)] for name, ranks in found.items()}


def _rotation(lab: Lab) -> dict[str, float]:
    """Largest relative change of any singular value when every top column is rotated by random angles."""
    generator, worst = torch.Generator().manual_seed(1), 0.0
    for weight in _weights(lab).values():
        shape, flat = LayerShape.of(weight), weight.flatten(1).double()
        config = SpectralRConfig(tuple(range(RANK)))
        columns = select_columns(weight, Columns.block(0, RANK))
        params = method_of(config).init(config, shape, (columns.u, columns.s, columns.v), generator)
        for name in ("q_u", "q_v"):
            params[name] = torch.randn(params[name].shape, generator=generator)
        change = delta(method_of(config).fold(config, shape, params, 1.0)).flatten(1).double()
        before, after = torch.linalg.svdvals(flat), torch.linalg.svdvals(flat + change)
        worst = max(worst, float(((after - before).abs() / before[0]).max()))
    return {"largest_change": worst}
