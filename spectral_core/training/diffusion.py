"""The diffusion side of training: adding noise and what the model should predict from it.

With ᾱ the cumulative product of the noise schedule: x_t = √ᾱ·x₀ + √(1−ᾱ)·ε. An ε-model predicts ε
(Ho et al., NeurIPS 2020, arXiv 2006.11239), a v-model √ᾱ·ε − √(1−ᾱ)·x₀ (Salimans & Ho, ICLR 2022, arXiv
2202.00512).

Shapes: latents and noise (B, C, H, W), timesteps (B,) whole numbers, 0 the cleanest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SpectralAdapterError

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Diffusion:
    """ᾱ per timestep (T,) and the kind of prediction."""

    alphas_cumprod: Tensor
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise SpectralAdapterError(
                f"prediction type {self.prediction!r}: expected one of {', '.join(PREDICTIONS)}"
            )

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def _signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod.to(like.device)[timesteps].to(like.dtype)
        alphas = alphas.reshape(-1, *(1,) * (like.dim() - 1))
        return alphas.sqrt(), (1 - alphas).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, spread = self._signal_and_noise(timesteps, latents)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._signal_and_noise(timesteps, latents)
        return signal * noise - spread * latents

    def progress(self, timesteps: Tensor) -> Tensor:
        """0 = noisiest … 1 = cleanest, per row."""
        return 1 - timesteps.float() / (self.timesteps - 1)

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, self.timesteps, (count,), generator=generator)
