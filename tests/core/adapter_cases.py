"""The table that tests of attach, merge and the adapter share: every method and option, all trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from spectral_core.adapter.adapter import Adapter, Term, create
from spectral_core.methods import (
    Basis,
    FouRAConfig,
    LoRAConfig,
    MethodConfig,
    SpectralAConfig,
    SpectralRConfig,
    method_of,
)

MERGEABLE: dict[str, MethodConfig] = {
    "lora": LoRAConfig(3, alpha=6.0),
    "foura-dct": FouRAConfig(3, gate="none"),
    "foura-dft": FouRAConfig(3, alpha=1.5, transform="dft", gate="none"),
    "foura-none": FouRAConfig(3, transform="none", gate="none"),
    "foura-frozen": FouRAConfig(4, gate="frozen"),
    "foura-dft-frozen": FouRAConfig(4, transform="dft", gate="frozen"),
    "spectral-a": SpectralAConfig((0, 2, 3)),
    "spectral-a-scale": SpectralAConfig((1, 2), train_scale=True),
    "spectral-r": SpectralRConfig((0, 1, 3)),
    "spectral-r-scale": SpectralRConfig((0, 1, 3), train_scale=True),
    "spectral-r-rotation": SpectralRConfig((0, 1, 3), strength_law="rotation"),
}
GATED: dict[str, MethodConfig] = {
    "foura-adaptive": FouRAConfig(4),
    "foura-dft-adaptive": FouRAConfig(4, transform="dft"),
    "foura-entropy": FouRAConfig(4, gate_kind="entropy"),
    "foura-budget": FouRAConfig(4, gate_budget=0.5),
}
ALL = MERGEABLE | GATED


def basis_of(config: MethodConfig) -> Callable[[str, Tensor], Basis]:
    """The chosen columns by the full SVD."""

    def basis(name: str, weight: Tensor) -> Basis:
        u, s, vh = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
        columns = list(config.columns)  # type: ignore[union-attr]
        return u[:, columns].float(), s[columns].float(), vh.mT[:, columns].float()

    return basis


def fresh(config: MethodConfig, weights: Mapping[str, Tensor]) -> Adapter:
    """As training starts: ΔW = 0."""
    return create(weights, config, basis_of(config), Generator().manual_seed(0))


def trained(config: MethodConfig, weights: Mapping[str, Tensor], seed: int = 1, size: float = 0.3) -> Adapter:
    """An adapter whose trained tensors are all moved off their start; frozen gates are partly closed."""
    generator = Generator().manual_seed(seed)

    def move(name: str, term: Term) -> Term:
        learns = method_of(term.config).trainable(term.config)
        params = {
            k: v + size * torch.randn(v.shape, generator=generator) if k in learns else v
            for k, v in term.params.items()
        }
        if "gate.mask" in params:
            params["gate.mask"] = torch.tensor([1.0, 0.0, 1.0, 1.0])
        if "gate.w2" in params:  # gates that open and close with the input
            params["gate.w2"] = 4 * params["gate.w2"]
            params["gate.bias"] = params["gate.bias"] - 2
        return replace(term, params=params)

    return fresh(config, weights).map_terms(move)


class Mixed(nn.Module):
    """Linear, fused and convolution layers of odd sizes in one small net; x (B, 5, 9, 9)."""

    def __init__(self) -> None:
        super().__init__()
        generator = Generator().manual_seed(7)
        self.conv = nn.Conv2d(5, 11, 3, stride=2, padding=1)
        self.reflect = nn.Conv2d(11, 13, (3, 1), padding=(1, 0), padding_mode="reflect", dilation=1)
        self.linear = nn.Linear(13, 17)
        self.qkv = nn.Linear(17, 3 * 7, bias=False)
        self.out = nn.Linear(7, 4)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.reflect(torch.tanh(self.conv(x))))
        h = torch.tanh(self.linear(h.flatten(2).mT))
        q, k, v = self.qkv(h).chunk(3, -1)
        return self.out(torch.softmax(q @ k.mT, -1) @ v)  # type: ignore[no-any-return]


def mixed_weights(model: Mixed) -> dict[str, Tensor]:
    """Every layer; of the fused one its three slices, the last narrower than a third."""
    weights = {f"unet.{n}": m.weight.detach() for n, m in model.named_children() if n != "qkv"}  # type: ignore[union-attr, operator]
    for start, stop in ((0, 7), (7, 14), (15, 21)):
        weights[f"unet.qkv[{start}:{stop}]"] = model.qkv.weight.detach()[start:stop]
    return weights


def mixed_input(dtype: torch.dtype = torch.float32, batch: int = 3) -> Tensor:
    return torch.randn(batch, 5, 9, 9, generator=Generator().manual_seed(3)).to(dtype)


def instance_keys(model: nn.Module) -> list[list[str]]:
    """What each module has of its own, in order: a removed adapter leaves nothing of itself here."""
    return [list(m.__dict__) for m in model.modules()]
