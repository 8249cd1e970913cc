"""A denoiser of two layers over flattened latents, and everything to train adapters on it in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_core.adapter.adapter import Adapter, create
from spectral_core.attach.attaching import Attachment, attach
from spectral_core.maths.svd import Columns, select_columns
from spectral_core.methods import (
    FouRAConfig,
    LoRAConfig,
    MethodConfig,
    OrthogonalConfig,
    SpectralAConfig,
    SpectralRConfig,
)
from spectral_core.training.data.folder import Example, Order
from spectral_core.training.engine.loop import Setup
from spectral_core.training.objectives.diffusion import Diffusion

CONFIGS: list[MethodConfig] = [
    LoRAConfig(4),
    FouRAConfig(4, gate="none"),
    FouRAConfig(4, transform="dft", gate="adaptive"),
    SpectralAConfig((0, 1, 2, 3), train_scale=True),
    SpectralRConfig((0, 1, 2, 3), train_scale=True),
    OrthogonalConfig(4),
]


class Denoiser(nn.Module):
    """Pointwise over flattened latents; captions play no part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.first(x.flatten(1)))
        return self.second(hidden).reshape(x.shape)


def basis(_: str, weight: Tensor, block: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    found = select_columns(weight, Columns.block(block, 4))
    return found.u, found.s, found.v


class Toy:
    """model, attachment and setup over six latents; ``batch`` rows a step; ``block`` of columns."""

    def __init__(self, config: MethodConfig, batch: int = 3, block: int = 0, **changes: Any) -> None:
        torch.manual_seed(1)
        self.model = Denoiser().requires_grad_(False)
        weights = {f"net.{n}": getattr(self.model, n).weight for n in ("first", "second")}
        self.adapter: Adapter = create(
            weights, config, partial(basis, block=block), torch.Generator().manual_seed(0)
        )
        self.attachment: Attachment = attach(self.model, self.adapter, part="net", trainable=True)
        self.examples = [Example(Path(str(i)), "") for i in range(6)]
        self.on_call: Callable[[], None] = lambda: None
        self.setup = Setup(
            denoiser=self.denoise,
            latents=torch.randn(6, 1, 4, 4).sign(),
            order=Order(self.examples, batch, 0),
            diffusion=Diffusion(torch.linspace(0.99, 0.2, 50), "v_prediction"),
            attachments=[self.attachment],
        )
        self.setup = replace(self.setup, **changes)

    def denoise(self, noisy: Tensor, timesteps: Tensor, captions: Sequence[int | None]) -> Tensor:
        self.on_call()
        out: Tensor = self.model(noisy)
        return out

    @property
    def digest(self) -> str:
        """Of every tensor of the adapter as it is now."""
        return self.attachment.to_adapter().content_hash
