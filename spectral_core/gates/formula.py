"""The adaptive rank gate: which of an adapter's rows are open, decided from the layer's own input.

FouRA (Borse et al., NeurIPS 2024, arXiv 2406.08798) prints G(z) = 1 where S(H(𝒢 z)) == 1, else 0: a learned
network, an entropy, a sigmoid, soft in training, hard and input-dependent at inference. In floating point
that gate is never on (or, rounded, always), so this one keeps its idea and not its letter:

    φ = log(mean over tokens |z|² + 1e-12),  input = [LayerNorm(φ), mean(φ) − μ]
    logits = bias + W₂·SiLU(W₁·input + b₁),  p = σ((logits − θ) / τ),  open where p > ½, and the largest

θ is 0. The gate with the largest logit is open in any case: no input loses a layer's whole adapter. With a
``budget`` the k = max(1, round(budget · rank)) largest logits are open for every input, no more and no fewer,
and θ lies in the middle between the k-th and the next.

μ, a stored number per layer, shows the network the overall scale of z, which LayerNorm alone removes.
``entropy`` puts scale·H(σ(logits)) + shift, H the binary entropy in nats, in place of the logits: the printed
formula's nearest trainable neighbour. Every row of a batch gates itself, and all of it runs in float32.

Shapes: z (B, …, R) or (B, R, *space), R = rank · rows_per_gate; φ, logits and p (B, rank); W₁ (hidden, rank +
1), W₂ (rank, hidden), hidden = max(⌊rank/8⌋, 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..maths.layers import as_fp32
from ..maths.precision import full_precision
from .record import GateRecorder
from .runtime import GateRuntime, mode_at, temperature_at

__all__ = [
    "KINDS",
    "GateRecorder",
    "GateRuntime",
    "features",
    "freeze",
    "init",
    "logits",
    "mode_at",
    "probabilities",
    "temperature_at",
    "tensor_shapes",
    "trainable",
    "trained_tensor",
    "values",
]

Kind = Literal["mlp", "entropy"]
KINDS: tuple[Kind, ...] = get_args(Kind)
INITIAL_LOGIT = 2.0
_FLOOR = 1e-12  # of the mean energy, before its logarithm

Params = Mapping[str, Tensor]


def tensor_shapes(rank: int, kind: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of one layer's gate; ``gate.mu`` and ``gate.mean_open`` (E[p]) are stored, not trained."""
    hidden = max(rank // 8, 4)
    shapes: dict[str, tuple[int, ...]] = {
        "gate.w1": (hidden, rank + 1),
        "gate.b1": (hidden,),
        "gate.w2": (rank, hidden),
        "gate.bias": (rank,),
    }
    if kind == "entropy":
        shapes |= {"gate.entropy_scale": (rank,), "gate.entropy_shift": (rank,)}
    return shapes | {"gate.mu": (), "gate.mean_open": (rank,)}


def trainable(kind: str) -> tuple[str, ...]:
    names = ("gate.w1", "gate.b1", "gate.w2", "gate.bias")
    return (*names, "gate.entropy_scale", "gate.entropy_shift") if kind == "entropy" else names


def trained_tensor(path: str) -> str:
    """The gate's trained tensor that a parameter ``<layer>.gate.<tensor>`` is; empty for other parameters,
    also of layers that are themselves called ``gate``."""
    name = path.rpartition(".gate.")[2]
    return name if f"gate.{name}" in trainable("entropy") and name != path else ""


def init(rank: int, kind: str, generator: Generator | None) -> dict[str, Tensor]:
    """Every gate open with logit 2 whatever the input (W₂ = 0); W₁ ~ U(−b, b), b = (rank + 1)^-½."""
    params = {name: torch.zeros(shape) for name, shape in tensor_shapes(rank, kind).items()}
    bound = 1 / math.sqrt(rank + 1)
    params["gate.w1"].uniform_(-bound, bound, generator=generator)
    params["gate.bias"].fill_(INITIAL_LOGIT)
    params["gate.mean_open"].fill_(1.0)
    if kind == "entropy":  # 4·H(σ(2)) + 0.54 = 2.00: it starts where the other kind does
        params["gate.entropy_scale"].fill_(4.0)
        params["gate.entropy_shift"].fill_(0.54)
    return params


def features(z: Tensor, rows_per_gate: int, is_convolution: bool) -> Tensor:
    """φ (B, rank) = log(mean over tokens or space of |z|² + 1e-12), in float32 from before the squaring.

    A 2-D z is (B, R): every row is its own batch row. rows_per_gate 2 pairs row i with row i + rank: Re² +
    Im².
    """
    over = tuple(range(2, z.dim())) if is_convolution else tuple(range(1, z.dim() - 1))
    energy = as_fp32(z).square()
    if over:
        energy = energy.mean(over)
    if rows_per_gate == 2:
        real, imaginary = energy.chunk(2, 1)
        energy = real + imaginary
    return torch.log(energy + _FLOOR)


def logits(params: Params, phi: Tensor, kind: str) -> Tensor:
    """(B, rank) from φ (B, rank): positive where the gate is open, before the temperature."""
    w1, b1, w2, bias, *entropy = (params[name].to(phi.dtype) for name in trainable(kind))
    with full_precision(phi.device):  # a product in half precision would move the threshold
        level = phi.mean(-1, keepdim=True) - params["gate.mu"].to(phi.dtype)
        seen = torch.cat([F.layer_norm(phi, phi.shape[-1:]), level], -1)
        hidden = F.silu(F.linear(seen, w1, b1))
        out = F.linear(hidden, w2, bias)
    if kind == "entropy":
        scale, shift = entropy
        p = torch.sigmoid(out)
        # −p·ln p − (1−p)·ln(1−p) with ln p = logsigmoid, which stays finite where p rounds to 0 or 1
        out = scale * -(p * F.logsigmoid(out) + (1 - p) * F.logsigmoid(-out)) + shift
    return out


def probabilities(raw: Tensor, temperature: float, budget: float = 0.0) -> Tensor:
    """p (B, rank) = σ((logits − θ) / τ), τ > 0."""
    return torch.sigmoid((raw - threshold(raw, budget)) / temperature)


def open_rows(rank: int, budget: float) -> int:
    """k: how many gates a budget (a share of the rank, above 0) keeps open."""
    return max(1, round(budget * rank))


def threshold(raw: Tensor, budget: float) -> Tensor | float:
    """θ (B, 1) of logits (B, rank) under a budget, 0 without."""
    rank = raw.shape[-1]
    if not budget or (k := open_rows(rank, budget)) == rank:
        return 0.0
    return raw.topk(k + 1, -1).values[..., k - 1 :].mean(-1, keepdim=True)


def opened(values: Tensor, middle: float, budget: float) -> Tensor:
    """Which gates are open, of their logits (…, rank) with middle 0 or of E[p] with middle ½: those above it
    and always the largest; with a budget the k largest."""
    # no gradient goes through it; a graph that no backward frees would stay in memory under saving hooks
    values = values.detach()
    if not budget:
        return (values > middle) | (values == values.amax(-1, keepdim=True))
    largest = values.topk(open_rows(values.shape[-1], budget), -1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, largest, True)


def freeze(mean_open: Tensor, budget: float = 0.0) -> Tensor:
    """The fixed 0/1 mask (rank,) of a frozen gate: open where E[p] > ½, and where it is largest; with a
    budget, its k largest."""
    return opened(mean_open, 0.5, budget).float()


def values(
    z: Tensor,
    params: Params,
    kind: str,
    rows_per_gate: int,
    is_convolution: bool,
    runtime: GateRuntime,
    name: str,
    budget: float = 0.0,
) -> Tensor:
    """G(z) (B, R) in z's dtype, of the folded down projection z of one layer before alpha and strength."""
    phi = features(z, rows_per_gate, is_convolution)
    params = {**params, "gate.mu": runtime.mu(name, params["gate.mu"])}
    raw = logits(params, phi, kind)
    p = None
    if runtime.mode != "hard" or runtime.wants_p:
        p = probabilities(raw, runtime.temperature, budget)
    is_open = opened(raw, 0.0, budget)
    runtime.watch(name, phi, raw, is_open, p)
    if runtime.mode == "soft":
        assert p is not None
        found = p.to(z.dtype)
    elif p is not None and runtime.mode == "straight_through":
        found = (p + (is_open.to(p.dtype) - p).detach()).to(z.dtype)
    else:
        found = is_open.to(z.dtype)
    return torch.cat([found, found], 1) if rows_per_gate == 2 else found
