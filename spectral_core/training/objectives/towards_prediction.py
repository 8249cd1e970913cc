"""Training towards other predictions instead of towards noise: the denoiser answers with the difference.

Shapes: latents and noise (B, C, H, W), timesteps (B,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .diffusion import UNIFORM, NoiseProcess, Shares


@dataclass(frozen=True)
class ResidualNoise:
    """The model's noise levels with a target of 0, for a denoiser that answers with what is missing."""

    inner: NoiseProcess

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.inner.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return torch.zeros_like(latents)

    def progress(self, timesteps: Tensor) -> Tensor:
        return self.inner.progress(timesteps)

    def sample_timesteps(self, count: int, generator: torch.Generator, shares: Shares = UNIFORM) -> Tensor:
        return self.inner.sample_timesteps(count, generator, shares)

    def levels(self, count: int) -> Tensor:
        return self.inner.levels(count)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        return self.inner.min_snr_weights(timesteps, gamma)
