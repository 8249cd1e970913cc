"""The whole Stable Diffusion 1.5 UNet: a training step against PEFT's LoRA, and the spectra of its attention.

    python -m benchmarks.speed.unet [--only steps svd] [--repetitions 3] [--rank 8] [--threads N]

Steps: diffusers' UNet2DConditionModel in SD 1.5's shape (860 M random weights, float32), 16×16 latents,
batch 1; forward, backward and AdamW on the adapters of the 128 attention layers. All candidates share one set
of base weights and take turns in one process. Two figures for memory. ``peak``: the highest resident size of
the process during a step (VmHWM, reset before each; Linux only), without the parameters and optimiser states
of the other candidates; base weights and libraries are in it. ``saved``: the bytes that autograd keeps for
backward beyond the base weights, exact, by saved_tensors_hooks.

SVD: the top 8 columns of all 128 attention matrices, planted with the spectrum σᵢ = 1/i, so that the true
columns are known. The full ``torch.linalg.svd`` runs on one matrix of each shape (the best of three, in the
peer's favour) and is multiplied by that shape's count. Random weights have no separated top 8: what the
solver falls back to there is reported, without a target.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.common import Target, Times, finish, kept_for_backward, orders
from spectral_core.adapter.adapter import create
from spectral_core.attach.attaching import attach
from spectral_core.attach.targets import find_targets
from spectral_core.maths.svd import Columns, SVDColumns, top_columns
from spectral_core.maths.svd_cache import SVDCache
from spectral_core.methods import FouRAConfig, MethodConfig, SpectralAConfig, SpectralRConfig

PEER = "peft lora"
TOP = 8
STATUS = Path("/proc/self/status")

# --- the training step ----------------------------------------------------------------------------


def sd15_unet() -> UNet2DConditionModel:
    """SD 1.5's architecture; frozen, with random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
    )
    return unet.requires_grad_(False)  # type: ignore[no-any-return]


def twin(unet: nn.Module) -> nn.Module:
    """Another tree of modules over the same weights."""
    return copy.deepcopy(unet, {id(t): t for t in [*unet.parameters(), *unet.buffers()]})


def configurations(rank: int) -> dict[str, MethodConfig]:
    columns = tuple(range(rank))
    return {
        "foura dct": FouRAConfig(rank, gate="none"),
        "foura dct adaptive": FouRAConfig(rank),
        "foura dft": FouRAConfig(rank, transform="dft", gate="none"),
        "spectral a": SpectralAConfig(columns),
        "spectral r": SpectralRConfig(columns),
    }


@dataclass
class Candidate:
    """A UNet with trainable adapters on it, and its optimiser."""

    unet: nn.Module
    parameters: list[nn.Parameter]
    around: Callable[[], AbstractContextManager[None]] = nullcontext  # of a pass and its backward

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)  # as the trainer has it

    def loss(self) -> Tensor:
        draw = torch.Generator().manual_seed(1)
        latents, noise = torch.randn(2, 1, 4, 16, 16, generator=draw)
        context = torch.randn(1, 77, 768, generator=draw)
        return F.mse_loss(self.unet(latents, torch.tensor([500]), context).sample, noise)

    def step(self) -> None:
        with self.around():
            self.loss().backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def saved_bytes(self) -> int:
        """What a step keeps for its backward."""
        return kept_for_backward(self.unet, self.step)


def candidate(unet: nn.Module, name: str, rank: int) -> Candidate:
    tree = twin(unet)
    if name == PEER:
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), tree)
        return Candidate(tree, [p for p in tree.parameters() if p.requires_grad])
    weights, _ = find_targets(tree, "unet", "attention")
    adapter = create(weights, configurations(rank)[name], _any_basis(rank))
    attachment = attach(tree, adapter, trainable=True)
    return Candidate(tree, list(attachment.parameters()), attachment.folded_together)


def _any_basis(rank: int) -> Callable[[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Orthonormal columns of the right shapes: the time of a step does not depend on which they are."""

    def basis(name: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, v = (torch.linalg.qr(torch.randn(n, rank))[0] for n in weight.shape)
        return u, torch.linspace(2, 1, rank), v

    return basis


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; 0 where the system does not tell."""
    if not STATUS.exists():
        return 0
    line = next(x for x in STATUS.read_text(encoding="utf-8").splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def timed_and_peak(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and the highest resident size of the process meanwhile; freed memory is handed back before."""
    if STATUS.exists():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    seconds = timed(run)
    return seconds, _resident("VmHWM")


def measure_steps(rank: int, repetitions: int) -> tuple[list[dict[str, Any]], list[Target]]:
    unet = sd15_unet()
    names = [PEER, *configurations(rank)]
    found = {name: candidate(unet, name, rank) for name in names}
    layers = len(find_targets(unet, "unet", "attention")[0])
    assert layers == 128, f"{layers} attention layers"
    saved = {name: c.saved_bytes() for name, c in found.items()}  # which warms up, too
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[int]] = {name: [] for name in names}
    for order in orders(names, repetitions):
        for name in order:
            took, peak = timed_and_peak(found[name].step)
            seconds[name].append(took)
            peaks[name].append(peak)
    times = Times({name: tuple(values) for name, values in seconds.items()})
    own = {name: sum(t.nbytes for t in _own_tensors(c)) for name, c in found.items()}
    rows, targets = [], []
    for name in names:
        others = sum(own.values()) - own[name]
        peak = max(int(statistics.median(peaks[name])) - others, 0)
        rows.append(times.row(name, to=PEER) | {"peak": peak, "saved": saved[name], "parameters": own[name]})
    for row in rows[1:]:
        spread = times.ratio(row["name"], PEER)
        targets.append(Target.of(f"{row['name']}: step time / {PEER}", spread, 1.05))
        if rows[0]["peak"]:
            targets.append(
                Target(f"{row['name']}: peak memory / {PEER}", row["peak"] / rows[0]["peak"], 1.02)
            )
    return rows, targets


def _own_tensors(found: Candidate) -> Iterator[Tensor]:
    """A candidate's parameters and the state of its optimiser."""
    for parameter in found.parameters:
        yield parameter
        yield from (v for v in found.optimiser.state[parameter].values() if isinstance(v, Tensor))


# --- the spectra ----------------------------------------------------------------------------------


def attention_shapes() -> list[tuple[int, int]]:
    """(out, in) of the 128 attention matrices."""
    with torch.device("meta"):
        return [(w.shape[0], w.shape[1]) for w in find_targets(sd15_unet(), "unet", "attention")[0].values()]


class Planted:
    """Weights U·diag(1/i)·Vᵀ with known U and V: one orthogonal matrix per size, its rows and columns
    shuffled."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.draw = torch.Generator().manual_seed(2)
        self.orthogonal = {
            n: torch.linalg.qr(torch.randn(n, n, generator=self.draw, dtype=torch.float64))[0] for n in sizes
        }

    def _columns(self, n: int, count: int) -> Tensor:
        rows, columns = (torch.randperm(n, generator=self.draw) for _ in range(2))
        return self.orthogonal[n][rows][:, columns[:count]]

    def weight(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The weight in float32 and its true top columns in float64."""
        count = min(shape)
        u, v = self._columns(shape[0], count), self._columns(shape[1], count)
        s = 1 / torch.arange(1, count + 1, dtype=torch.float64)
        return (u * s).float() @ v.mT.float(), u[:, :TOP], v[:, :TOP]


def subspace_error(found: Tensor, true: Tensor) -> float:
    """Sine of the largest angle between two column spaces."""
    q = torch.linalg.qr(found.double())[0]
    return float(torch.linalg.matrix_norm(q - true @ (true.mT @ q), ord=2))


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def median_of_three(run: Callable[[], object]) -> float:
    """One stall would be multiplied by the number of matrices."""
    return statistics.median(timed(run) for _ in range(3))


def measure_svd() -> tuple[list[dict[str, Any]], list[Target]]:
    shapes = attention_shapes()
    counts = Counter(shapes)
    planted = Planted({n for shape in counts for n in shape})
    cases = [planted.weight(shape) for shape in shapes]
    top_columns(cases[0][0], TOP)  # the libraries' own start
    results = []
    ours = [timed(lambda w=w: results.append(top_columns(w, TOP))) for w, _, _ in cases]  # type: ignore[misc]
    worst = max(
        max(subspace_error(r.u, u), subspace_error(r.v, v))
        for r, (_, u, v) in zip(results, cases, strict=True)
    )
    columns = Columns.block(0, TOP)
    with tempfile.TemporaryDirectory() as folder:
        cold = timed(lambda: [SVDCache(folder).get_or_compute(w, columns) for w, _, _ in cases])
        warm_cache = SVDCache(folder)
        warm = median_of_three(lambda: [warm_cache.get_or_compute(w, columns) for w, _, _ in cases])
        assert warm_cache.report.hits == 3 * len(cases)
    rows, own_total, full_total, random_total = [], 0.0, 0.0, 0.0
    for shape, count in counts.items():
        weight = cases[shapes.index(shape)][0]
        full = median_of_three(lambda w=weight: torch.linalg.svd(w, full_matrices=False))  # type: ignore[misc]
        own = statistics.median(t for t, s in zip(ours, shapes, strict=True) if s == shape)
        found: list[SVDColumns] = []
        plain = torch.randn(shape) / shape[1] ** 0.5
        fallback = median_of_three(lambda w=plain, to=found: to.append(top_columns(w, TOP)))  # type: ignore[misc]
        own_total += count * own
        full_total += count * full
        random_total += count * fallback
        rows.append(
            {
                "name": f"svd {shape[0]}×{shape[1]}",
                "count": count,
                "seconds": own,
                "full": full,
                "ratio": own / full,
            }
            | {"random weights": fallback, "their solver": found[0].solver}
        )
    total = {"name": "svd of all", "count": len(shapes), "seconds": own_total, "full": full_total}
    rows.append(total | {"ratio": own_total / full_total, "random weights": random_total, "cached": warm})
    return rows, [
        Target("svd of 128: full / ours", full_total / own_total, 15.0, ">="),
        Target("svd of 128: top-8 subspace error", worst, 1e-4),
        Target("svd of 128: seconds uncached", cold, 10.0),
        Target("svd of 128: seconds from the cache", warm, 0.5),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=["steps", "svd"], default=["steps", "svd"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    if "svd" in options.only:
        found = measure_svd()
        rows, targets = rows + found[0], targets + found[1]
    if "steps" in options.only:
        found = measure_steps(options.rank, options.repetitions)
        rows, targets = rows + found[0], targets + found[1]
    settings = {"rank": options.rank, "repetitions": options.repetitions, "only": options.only}
    return finish("unet", rows, targets, settings)


if __name__ == "__main__":
    sys.exit(main())
