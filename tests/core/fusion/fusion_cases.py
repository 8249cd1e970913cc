"""What the tests of fusion by statistics share: layers, adapters and inputs, in float64 and off zero."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spectral_core.adapter.adapter import Adapter, AdapterLayer, Provenance, Term
from spectral_core.gates.formula import GateRuntime
from spectral_core.maths.layers import LayerShape
from spectral_core.maths.lowrank import delta
from spectral_core.methods import FouRAConfig, LoRAConfig, MethodConfig, SpectralAConfig, method_of
from tests.core.gates.gated import apply

SHAPES = {"unet.a": LayerShape(7, 10), "unet.b": LayerShape(9, 6)}
TOKENS = 60


def draw(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(config: MethodConfig, seed: int, name: str = "", **fields: object) -> Adapter:
    """Random trained tensors; a gate that opens and closes with its input."""
    layers = {}
    for i, (layer, shape) in enumerate(SHAPES.items()):
        sizes = method_of(config).tensor_shapes(config, shape)
        params = {
            key: 0.5 * draw(100 * seed + 10 * i + k, *size) for k, (key, size) in enumerate(sizes.items())
        }
        if "gate.bias" in params:
            params["gate.bias"] = 0.3 * params["gate.bias"]
            params["gate.w2"] = 6 * params["gate.w2"]
            params["gate.mean_open"] = torch.tensor([0.9, 0.2, 0.7])[: config.rank]
        layers[layer] = AdapterLayer(shape, (Term(config, params),))
    return Adapter(layers, Provenance(name=name), **fields)  # type: ignore[arg-type]


def concepts() -> list[Adapter]:
    """Three concepts of different methods, ranks and strengths."""
    return [
        adapter(LoRAConfig(2, alpha=1.0), 1, "one", strength=1.5),
        adapter(SpectralAConfig((0, 1)), 2, "two"),
        replace(
            adapter(FouRAConfig(3, transform="dft", gate="none"), 3, "three"),
            layer_strengths=(("unet.b", 0.5),),
        ),
    ]


GATED = FouRAConfig(3, transform="dct", gate="adaptive")


def inputs(seed: int, batch: int = 4) -> dict[str, Tensor]:
    """Correlated tokens (batch, tokens, in) per layer, of another distribution for every seed."""
    found = {}
    for i, (layer, shape) in enumerate(SHAPES.items()):
        mix = torch.eye(shape.in_features, dtype=torch.float64) + 0.6 * draw(
            7 * seed + i, shape.in_features, shape.in_features
        )
        tokens = draw(50 + 7 * seed + i, batch, TOKENS // batch, shape.in_features)
        found[layer] = tokens * (1 + torch.arange(batch, dtype=torch.float64))[:, None, None] @ mix
    return found


def output(adapted: Adapter, layer: str, x: Tensor, weight: float = 1.0) -> Tensor:
    """What an adapter adds on x (batch, tokens, in), gates as they open: (batch, tokens, out)."""
    total = x.new_zeros(*x.shape[:-1], SHAPES[layer].out_features)
    strength = weight * adapted.strength_of(layer)
    for term in adapted.layers[layer].terms:
        factors = term.factors(SHAPES[layer], strength)
        if term.mergeable:
            total = total + x @ delta(factors).mT
            continue
        z = x @ factors.down.mT
        z = apply(z, term.params, "mlp", term.config.rows_per_gate, False, GateRuntime(), layer)
        total = total + z @ factors.scaled_up().mT
    return total
