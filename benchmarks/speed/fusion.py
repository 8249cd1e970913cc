"""Fusing three rank-8 adapters on SD 1.5's 128 attention matrices: seconds, and objectives by form.

    python -m benchmarks.speed.fusion [--rank 8] [--steps 2] [--repetitions 3] [--threads N]

Seconds: every method over all 128 matrices. For closed-form they include the statistics, collected on
diffusers' UNet2DConditionModel in SD 1.5's shape (860 M random weights, float32), 16×16 latents, batch 2,
with each concept's adapter attached: in rank space and in full; in one round of ``--steps`` steps for each
concept, and in two rounds (the default of command and node) of half of them each. ``gradient`` is ours, 50
iterations on second moments; ``gradient on tokens`` is the way of Mix-of-Show's paper, 50 L-BFGS iterations
on the whole weight with the tokens of one step at 512×512 in every one. Both run on one matrix of each shape
(the latter for 5 iterations) and are scaled up by counts.

Objectives: Σᵢ E‖ΔWᵢx − ΔWx‖² over what the average reaches, on the tokens that were used and on held-out ones
of the same concepts. Inputs are planted: a covariance that falls as 1/i, half of it shared by the concepts,
half a concept's own, in shapes of SD 1.5 and with ¼, 1 and 4 tokens per input feature.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Spread, Target, finish
from benchmarks.speed.unet import sd15_unet
from spectral_core.adapter.adapter import Adapter, AdapterLayer, Provenance, Term
from spectral_core.attach.attaching import attach
from spectral_core.attach.targets import find_targets
from spectral_core.fusion import FUSIONS, FusionOptions, fuse
from spectral_core.fusion.rounds import ROUNDS, fuse_in_rounds
from spectral_core.maths.layers import LayerShape
from spectral_core.maths.lowrank import delta
from spectral_core.methods import LoRAConfig, SpectralAConfig
from spectral_core.statistics.collect import collect, modules_of
from spectral_core.statistics.moments import Statistics

CONCEPTS = 3
ITERATIONS = 50  # of Mix-of-Show's UNet layers
MEASURED_ITERATIONS = 5
SHAPES = {"320→320": (320, 320), "768→320": (320, 768), "640→640": (640, 640)}
TOKENS_PER_FEATURE = (0.25, 1.0, 4.0)
FORMS: Mapping[str, tuple[str, FusionOptions]] = {
    "average": ("average", FusionOptions()),
    "sum": ("sum", FusionOptions()),
    "closed-form, ridge 0": ("closed-form", FusionOptions(ridge=0.0)),
    "closed-form, ridge 0.03": ("closed-form", FusionOptions(ridge=0.03)),
    "closed-form, ridge 0.1": ("closed-form", FusionOptions()),
    "closed-form, ridge 0.3": ("closed-form", FusionOptions(ridge=0.3)),
    "subspaces": ("subspaces", FusionOptions()),
    "closed-form-rank": ("closed-form-rank", FusionOptions()),
    "gradient, 50": ("gradient", FusionOptions(iterations=50)),
    "gradient, 300": ("gradient", FusionOptions(iterations=300)),
}

# --- seconds --------------------------------------------------------------------------------------


def lora(weights: Mapping[str, Tensor], rank: int, seed: int) -> Adapter:
    """Random factors of a trained size on every layer."""
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for name, weight in weights.items():
        out, width = weight.shape
        down = torch.randn(rank, width, generator=draw) / width**0.5
        up = 0.05 * torch.randn(out, rank, generator=draw)
        layers[name] = AdapterLayer(
            LayerShape(out, width), (Term(LoRAConfig(rank), {"down": down, "up": up}),)
        )
    return Adapter(layers, Provenance(name=f"concept {seed}"))


def spectral(weights: Mapping[str, Tensor], rank: int, seed: int) -> Adapter:
    """The same for Spectral A in block ``seed`` of columns; orthonormal ones stand in for the weight's."""
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for name, weight in weights.items():
        shared = torch.Generator().manual_seed(0)
        columns = tuple(range(seed * rank, (seed + 1) * rank))
        u, v = (
            torch.linalg.qr(torch.randn(n, CONCEPTS * rank, generator=shared))[0][:, list(columns)]
            for n in weight.shape
        )
        a_u, a_v = (0.02 * torch.randn(n, rank, generator=draw) for n in weight.shape)
        s = 1.0 / (1.0 + torch.tensor(columns, dtype=torch.float32))
        params = {"u": u, "s": s, "v": v, "a_u": a_u, "a_v": a_v}
        layers[name] = AdapterLayer(LayerShape.of(weight), (Term(SpectralAConfig(columns), params),))
    return Adapter(layers, Provenance(name=f"concept {seed}"))


def seconds_of(run: Callable[[], object], repetitions: int) -> Spread:
    found = []
    for _ in range(repetitions):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return Spread.of(found)


def gather(
    unet: nn.Module, adapters: Sequence[Adapter], space: str, steps: int, under: Adapter | None = None
) -> list[dict[str, Statistics]]:
    """Statistics under every concept: its adapter attached, or ``under``; its own latents and text."""
    modules = modules_of(unet, adapters, "unet")
    found = []
    for place, adapter in enumerate(adapters):
        draw = torch.Generator().manual_seed(100 + place)
        context = torch.randn(2, 77, 768, generator=draw)
        with attach(unet, under or adapter), collect(modules, adapters, space) as seen, torch.no_grad():
            for step in range(steps):
                latents = torch.randn(2, 4, 16, 16, generator=draw)
                unet(latents, torch.tensor([900 - 800 * step // max(steps, 1)]), context)
        found.append(seen.statistics())
    return found


def on_tokens(shape: tuple[int, int], tokens: int, rank: int) -> float:
    """Seconds of Mix-of-Show's way for one matrix (out, in): L-BFGS on W, three concepts' tokens."""
    out, width = shape
    x = [torch.randn(tokens, width) for _ in range(CONCEPTS)]
    base = torch.randn(out, width) / width**0.5
    updates = [0.05 * torch.randn(out, rank) @ torch.randn(rank, width) / width**0.5 for _ in x]
    y = [given @ (base + update).mT for given, update in zip(x, updates, strict=True)]
    weight = (base + sum(updates) / CONCEPTS).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight], max_iter=MEASURED_ITERATIONS, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        pairs = zip(x, y, strict=True)
        loss = torch.stack([(given @ weight.mT - wanted).square().mean() for given, wanted in pairs]).sum()
        loss.backward()
        return loss

    started = time.perf_counter()
    optimiser.step(closure)  # type: ignore[arg-type]
    return (time.perf_counter() - started) * ITERATIONS / MEASURED_ITERATIONS


def time_gradients(
    adapters: Sequence[Adapter], statistics: Sequence[Mapping[str, Statistics]]
) -> dict[str, float]:
    """Seconds for all matrices of the two ways to descend, without the statistics."""
    shapes: dict[tuple[int, int], list[str]] = {}
    for name, layer in adapters[0].layers.items():
        shapes.setdefault((layer.shape.out_features, layer.shape.in_features), []).append(name)
    found = {"gradient on second moments": 0.0, "gradient on tokens": 0.0}
    tokens = {320: 4096, 640: 1024, 1280: 256, 768: 77}
    for shape, names in shapes.items():
        alone = [adapter.only(names[:1]) for adapter in adapters]
        started = time.perf_counter()
        fuse(alone, "gradient", statistics=statistics, options=FusionOptions(iterations=ITERATIONS))
        found["gradient on second moments"] += (time.perf_counter() - started) * len(names)
        seconds = on_tokens(shape, 2 * tokens[shape[1]], adapters[0].layers[names[0]].terms[0].config.rank)
        found["gradient on tokens"] += seconds * len(names)
    return found


def time_methods(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Target]]:
    unet = sd15_unet()
    weights, _ = find_targets(unet, "unet", "attention")
    assert len(weights) == 128
    plain = [lora(weights, options.rank, seed) for seed in range(CONCEPTS)]
    columns = [spectral(weights, options.rank, seed) for seed in range(CONCEPTS)]
    rows: list[dict[str, Any]] = []
    targets = []
    for name, fusion in FUSIONS.items():
        if fusion.needs_statistics:
            continue
        adapters = columns if name == "spectral" else plain
        spread = seconds_of(lambda a=adapters, n=name: fuse(a, n), options.repetitions)  # type: ignore[misc]
        rows.append({"what": f"{name}, 128 matrices", "seconds": spread.median})
        targets.append(Target.of(f"{name}: seconds", spread, 1.0))
    for space in ("rank", "exact"):
        started = time.perf_counter()
        statistics = gather(unet, plain, space, options.steps)
        collected = time.perf_counter() - started
        fuse(plain, "closed-form", statistics=statistics)
        total = time.perf_counter() - started
        name = f"closed-form, statistics in {space} space"
        rows.append({"what": name, "seconds": total, "of it statistics": collected})
        targets.append(Target(f"{name}: seconds", total, 30.0))
        each = max(options.steps // ROUNDS, 1)
        started = time.perf_counter()
        fuse_in_rounds(
            lambda under, s=space, n=each: gather(unet, plain, s, n, under),  # type: ignore[misc]
            lambda seen: fuse(plain, "closed-form", statistics=seen),
        )
        total = time.perf_counter() - started
        name = f"closed-form in {ROUNDS} rounds, statistics in {space} space"
        rows.append({"what": name, "seconds": total, "steps of a round": each})
        targets.append(Target(f"{name}: seconds", total, 30.0))
    for name, seconds in time_gradients(plain, statistics).items():
        rows.append({"what": f"{name}, without statistics", "seconds": seconds})
    return rows, targets


# --- objectives -----------------------------------------------------------------------------------


def planted(width: int, seed: int) -> list[Tensor]:
    """Square roots (width, width) of each concept's covariance, eigenvalues 1/i: a shared half and an own."""
    draw = torch.Generator().manual_seed(seed)
    falls = torch.arange(1, width + 1, dtype=torch.float64).rsqrt()

    def half() -> Tensor:
        return torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))[0] * falls

    shared = half()
    return [torch.cat([shared, half()], 1) for _ in range(CONCEPTS)]


def objective(update: Tensor, updates: Sequence[Tensor], x: Sequence[Tensor]) -> float:
    pairs = zip(updates, x, strict=True)
    return sum(float((given @ (own - update).mT).square().sum(1).mean()) for own, given in pairs)


def compare(
    shape: tuple[int, int], per_feature: float, rank: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Form -> (objective on its tokens, on held-out ones), over the average's."""
    out, width = shape
    roots = planted(width, seed)
    draw = torch.Generator().manual_seed(seed + 1)

    def tokens(count: int) -> list[Tensor]:
        return [torch.randn(count, r.shape[1], generator=draw, dtype=torch.float64) @ r.mT for r in roots]

    x, held_out = tokens(int(per_feature * width)), tokens(4 * width)
    layer = "unet.layer"
    adapters = []
    for place, root in enumerate(roots):
        # what training finds: rows in the span of what the concept shows, columns anywhere
        down = torch.randn(rank, root.shape[1], generator=draw, dtype=torch.float64) @ root.mT
        up = torch.randn(out, rank, generator=draw, dtype=torch.float64)
        term = Term(LoRAConfig(rank), {"down": down, "up": up})
        adapters.append(
            Adapter(
                {layer: AdapterLayer(LayerShape(out, width), (term,))}, Provenance(name=f"concept {place}")
            )
        )
    updates = [delta(a.layers[layer].factors()) for a in adapters]
    statistics = [{layer: Statistics.of(given)} for given in x]
    found = {}
    for name, (method, chosen) in FORMS.items():
        fused = fuse(adapters, method, statistics=statistics, options=chosen).adapter
        update = delta(fused.layers[layer].factors())
        found[name] = (objective(update, updates, x), objective(update, updates, held_out))
    return {n: (f / found["average"][0], h / found["average"][1]) for n, (f, h) in found.items()}


def compare_forms(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Target]]:
    rows, excess = [], 0.0
    for name, shape in SHAPES.items():
        for per_feature in TOKENS_PER_FEATURE:
            found = compare(shape, per_feature, options.rank, seed=5)
            place = {"what": f"objective, {name}", "tokens": f"{per_feature:g} n"}
            for form, (fitted, held_out) in found.items():
                rows.append(place | {"form": form, "fitted": fitted, "held-out": held_out})
            reached = found["gradient, 300"][0]
            least = found["closed-form, ridge 0"][0]
            if reached > 1e-9 or least > 1e-9:  # below one token per feature everything can be kept
                excess = max(excess, least / reached - 1)
            print(f"{name}, {per_feature:g} tokens per feature: done", file=sys.stderr)
    return rows, [Target("exact form, ridge 0, above the iteration: share", excess, 1e-3)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    timed, time_targets = time_methods(options)
    compared, form_targets = compare_forms(options)
    return finish("fusion", timed + compared, time_targets + form_targets, vars(options))


if __name__ == "__main__":
    sys.exit(main())
