"""One linear layer with an adapter: forward, and forward + backward, against the base layer and PEFT's LoRA.

    python -m benchmarks.speed.layers [--repetitions 20] [--sizes 320 640 1280] [--ranks 8 64]

Ours run the way users run them, through ``spectral_core.attach.attaching``: forward with folded factors kept
from the call before, training with the factors folded from float32 parameters in every call. Two peers
compute the same updates the other way: ``rebuild`` is Spectral A as its authors released it, U·S·Vᵀ of the
whole weight in every forward, and ``fft of activations`` is FouRA as its formula reads, with the transforms
on the tokens.

Sizes are those of Stable Diffusion 1.5 at 512×512: 4096 tokens of 320, 1024 of 640, 256 of 1280; batch 2. In
training the input needs a gradient too, as it does inside a network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.common import Spread, Target, Times, finish, interleave
from spectral_core.adapter.adapter import Adapter, create
from spectral_core.attach.attaching import attach
from spectral_core.methods import FouRAConfig, LoRAConfig, MethodConfig, SpectralAConfig, SpectralRConfig

TOKENS = {320: 4096, 640: 1024, 1280: 256}
BATCH = 2
PEER = "peft lora"


@dataclass(frozen=True)
class Layer:
    """A pretrained weight (n, n) and its singular vectors."""

    weight: Tensor
    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def of_size(cls, n: int) -> Layer:
        weight = torch.randn(n, n) / n**0.5
        u, s, vh = torch.linalg.svd(weight)
        return cls(weight, u, s, vh.mT.contiguous())

    def network(self) -> nn.Sequential:
        """A frozen network of this one layer."""
        linear = nn.Linear(len(self.s), len(self.s), bias=False).requires_grad_(False)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
        return nn.Sequential(linear)


def configurations(rank: int) -> dict[str, MethodConfig]:
    columns = tuple(range(rank))
    return {
        "lora": LoRAConfig(rank),
        "foura none": FouRAConfig(rank, transform="none", gate="none"),
        "foura dct": FouRAConfig(rank, gate="none"),
        "foura dct frozen": FouRAConfig(rank, gate="frozen"),
        "foura dct adaptive": FouRAConfig(rank, gate="adaptive"),
        "foura dft": FouRAConfig(rank, transform="dft", gate="none"),
        "foura dft adaptive": FouRAConfig(rank, transform="dft", gate="adaptive"),
        "spectral a": SpectralAConfig(columns),
        "spectral r": SpectralRConfig(columns),
    }


def adapter_of(layer: Layer, config: MethodConfig, trained: Mapping[str, Tensor]) -> Adapter:
    """An adapter off zero; tensors in ``trained`` are taken as they are, so that peers can share them."""
    rank = config.rank
    basis = (layer.u[:, :rank].contiguous(), layer.s[:rank], layer.v[:, :rank].contiguous())
    adapter = create({"unet.0": layer.weight}, config, lambda name, weight: basis)
    params = next(iter(adapter.layers.values())).terms[0].params
    for key in ("up", "b", "a_u", "a_v", "q_u", "q_v"):
        if key in params:
            params[key].copy_(trained[key] if key in trained else 0.02 * torch.randn_like(params[key]))
    if "a" in params:
        params["a"].copy_(trained["a"])
    if "gate.mask" in params:  # half of the gates open
        params["gate.mask"].copy_(torch.arange(rank) % 2)
    return adapter


class Rebuild(nn.Module):
    """Spectral A with the whole weight multiplied together in every forward: two n × n products."""

    def __init__(self, layer: Layer, a_u: Tensor, a_v: Tensor) -> None:
        super().__init__()
        self.layer, self.rank = layer, a_u.shape[1]
        self.a_u, self.a_v = nn.Parameter(a_u.clone()), nn.Parameter(a_v.clone())

    def forward(self, x: Tensor) -> Tensor:
        r, base = self.rank, self.layer
        u = torch.cat([base.u[:, :r] + self.a_u, base.u[:, r:]], 1)
        v = torch.cat([base.v[:, :r] + self.a_v, base.v[:, r:]], 1)
        return F.linear(x, u @ torch.diag(base.s) @ v.mT)


class ActivationFFT(nn.Module):
    """FouRA ``dft`` as its formula reads: z = A·F(x), W·x + Re F⁻¹(B·z)."""

    def __init__(self, layer: Layer, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base = layer.network()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft(x, norm="ortho")
        z = F.linear(spectrum, self.a.to(spectrum.dtype))
        return self.base(x) + torch.fft.ifft(F.linear(z, self.b.to(z.dtype)), norm="ortho").real


def peft_lora(layer: Layer, rank: int) -> nn.Module:
    network = layer.network()
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]), network)
    nn.init.normal_(network[0].lora_B["default"].weight, std=0.02)  # type: ignore[union-attr, index, arg-type]
    return network


def networks(layer: Layer, rank: int, training: bool) -> dict[str, nn.Module]:
    """Every candidate; ours are networks with an adapter attached."""
    n = len(layer.s)
    names = {"a": (rank, n), "b": (n, rank), "a_u": (n, rank), "a_v": (n, rank)}
    shared = {name: 0.02 * torch.randn(shape) for name, shape in names.items()}
    found: dict[str, nn.Module] = {"base": layer.network(), PEER: peft_lora(layer, rank)}
    for name, config in configurations(rank).items():
        found[name] = layer.network()
        attach(found[name], adapter_of(layer, config, shared), trainable=training)
    found["rebuild"] = Rebuild(layer, shared["a_u"], shared["a_v"])
    found["fft of activations"] = ActivationFFT(layer, shared["a"], shared["b"])
    return found


def check(found: Mapping[str, nn.Module], x: Tensor) -> None:
    """The peers must compute what ours compute, and every adapter something."""
    with torch.no_grad():
        outputs = {name: network(x) for name, network in found.items()}
    for ours, peer in (("spectral a", "rebuild"), ("foura dft", "fft of activations")):
        torch.testing.assert_close(outputs[ours], outputs[peer], rtol=1e-3, atol=1e-3)
    for name, output in outputs.items():
        assert name == "base" or (output - outputs["base"]).abs().max() > 1e-3, f"{name} does nothing"


def measure(layer: Layer, rank: int, training: bool, repetitions: int) -> Times:
    n = len(layer.s)
    x = torch.randn(BATCH, TOKENS[n], n)
    gradient = torch.randn_like(x)
    found = networks(layer, rank, training)
    check(found, x)

    def forward(network: nn.Module) -> None:
        with torch.no_grad():
            network(x)

    def step(network: nn.Module) -> None:
        network(x.requires_grad_()).backward(gradient)
        x.grad = None

    run: Callable[[nn.Module], None] = step if training else forward
    calls = {name: (lambda network=network: run(network)) for name, network in found.items()}
    return interleave(calls, repetitions=repetitions)


def targets(measured: Mapping[tuple[int, int, str], Times]) -> list[Target]:
    """The issue's figures, each at its worst size and rank."""
    found = []
    limits = [
        ("foura dct", PEER, 1.05),
        ("foura dft", PEER, 1.15),
        ("spectral a", PEER, 1.15),
        ("foura dct adaptive", "foura dct", 1.10),
        ("foura dft adaptive", "foura dft", 1.10),
    ]
    for what in sorted({key[2] for key in measured}):
        cases = {key: times for key, times in measured.items() if key[2] == what}
        for name, to, limit in limits:
            ratios = [times.ratio(name, to) for times in cases.values()]
            found.append(Target.of(f"{name} / {to}, {what}", max(ratios, key=_median), limit))
        largest = max(key[0] for key in cases)
        speedups = [t.ratio("rebuild", "spectral a") for k, t in cases.items() if k[0] == largest]
        slowest = min(speedups, key=_median)
        found.append(Target.of(f"rebuild / spectral a at {largest}, {what}", slowest, 5.0, ">="))
    return found


def _median(found: Spread) -> float:
    return found.median


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(TOKENS), choices=list(TOKENS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    measured: dict[tuple[int, int, str], Times] = {}
    rows: list[dict[str, Any]] = []
    for n in options.sizes:
        layer = Layer.of_size(n)
        for rank in options.ranks:
            for what in ("forward", "training"):
                times = measure(layer, rank, what == "training", options.repetitions)
                measured[n, rank, what] = times
                place = {"size": n, "tokens": TOKENS[n], "rank": rank, "pass": what}
                for name in times.seconds:
                    row = times.row(name, to="base")
                    rows.append(place | row | {f"to {PEER}": times.ratio(name, PEER).median})
                print(f"{n} rank {rank} {what}: done", file=sys.stderr)
    return finish("layers", rows, targets(measured), vars(options))


if __name__ == "__main__":
    sys.exit(main())
