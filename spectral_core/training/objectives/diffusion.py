"""The diffusion side of training: noise levels, adding noise, what the model should predict, its weight.

With ᾱ the cumulative product of the noise schedule: x_t = √ᾱ·x₀ + √(1−ᾱ)·ε. An ε-model predicts ε
(Ho et al., NeurIPS 2020, arXiv 2006.11239), a v-model √ᾱ·ε − √(1−ᾱ)·x₀ (Salimans & Ho, ICLR 2022, arXiv
2202.00512). Flow matching: x_σ = (1−σ)·x₀ + σ·ε, predicted ε − x₀ (Lipman et al., ICLR 2023, arXiv
2210.02747), σ from a logit-normal distribution (Esser et al., ICML 2024, arXiv 2403.03206). Min-SNR weights
(Hang et al., ICCV 2023, arXiv 2303.09556): with SNR = ᾱ/(1−ᾱ), min(SNR, γ)/SNR for ε and
min(SNR, γ)/(SNR+1) for v.

Shapes: latents and noise (B, C, H, W), timesteps (B,): whole numbers for ε and v, real ones for flow
matching; 0 the cleanest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import SpectralAdapterError
from ..config.config import Timesteps

PREDICTIONS = ("epsilon", "v_prediction")
_SNR_FLOOR = 1e-8  # the last step of a schedule with zero terminal SNR


class Shares(NamedTuple):
    """How noise levels are distributed between the cleanest (0) and the noisiest (1)."""

    distribution: Timesteps = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) in [0, 1]. ``logit-normal``: sigmoid(mean + std·N(0, 1))."""
        if self.distribution == "uniform":
            return torch.rand(count, generator=generator)
        return torch.sigmoid(self.mean + self.std * torch.randn(count, generator=generator))


UNIFORM = Shares()


class NoiseProcess(Protocol):
    """What the loop asks of a model's noise; :class:`Diffusion` and :class:`FlowMatching` are two."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def progress(self, timesteps: Tensor) -> Tensor:
        """0 = noisiest … 1 = cleanest, per row."""

    def sample_timesteps(self, count: int, generator: torch.Generator, shares: Shares = UNIFORM) -> Tensor:
        """(count,) noise levels."""

    def levels(self, count: int) -> Tensor:
        """(count,) fixed levels, evenly spread between the ends."""

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """(B,) weights of the loss."""


def discrete_timesteps(total: int, count: int, generator: torch.Generator, shares: Shares) -> Tensor:
    """(count,) of the timesteps 0 … total − 1."""
    if shares.distribution == "uniform":
        return torch.randint(0, total, (count,), generator=generator)
    return (shares.draw(count, generator) * total).long().clamp(max=total - 1)


def min_snr(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Weights of the loss from SNR (B,): min(SNR, γ)/SNR for ε, /(SNR + 1) for v (Hang et al., 2023)."""
    snr = snr.clamp(min=_SNR_FLOOR)
    below = snr.clamp(max=gamma)
    return (below / snr if prediction == "epsilon" else below / (snr + 1)).float()


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

    def _alphas(self, timesteps: Tensor) -> Tensor:
        return self.alphas_cumprod.to(timesteps.device)[timesteps]

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

    def sample_timesteps(self, count: int, generator: torch.Generator, shares: Shares = UNIFORM) -> Tensor:
        """(count,) timesteps."""
        return discrete_timesteps(self.timesteps, count, generator, shares)

    def levels(self, count: int) -> Tensor:
        return torch.linspace(0, self.timesteps - 1, count + 2)[1:-1].long()

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """(B,) weights of the loss, at most γ/SNR and at most 1 (ε)."""
        alphas = self._alphas(timesteps).double()
        return min_snr(alphas / (1 - alphas), gamma, self.prediction)


@dataclass(frozen=True)
class FlowMatching:
    """Straight paths from data to noise. The model is told σ·scale; ``shift`` moves levels towards the noise:
    σ' = shift·σ / (1 + (shift − 1)·σ)."""

    shift: float = 1.0
    scale: float = 1000.0

    def __post_init__(self) -> None:
        if not (self.shift > 0 and self.scale > 0):
            raise SpectralAdapterError(
                f"flow matching with shift {self.shift} and scale {self.scale}: expected numbers above 0"
            )

    def _sigma(self, timesteps: Tensor, like: Tensor) -> Tensor:
        sigma = (timesteps.to(like.device) / self.scale).to(like.dtype)
        return sigma.reshape(-1, *(1,) * (like.dim() - 1))

    def _shifted(self, sigma: Tensor) -> Tensor:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = self._sigma(timesteps, latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def progress(self, timesteps: Tensor) -> Tensor:
        """1 − σ, per row."""
        return 1 - timesteps.float() / self.scale

    def sample_timesteps(self, count: int, generator: torch.Generator, shares: Shares = UNIFORM) -> Tensor:
        """(count,) values of σ·scale."""
        return self._shifted(shares.draw(count, generator)) * self.scale

    def levels(self, count: int) -> Tensor:
        return self._shifted(torch.linspace(0, 1, count + 2)[1:-1]) * self.scale

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        raise SpectralAdapterError(
            "weighting 'min-snr' with flow matching: it is defined for ε- and v-models; use 'none', with "
            "timesteps 'logit-normal' to stress the middle levels"
        )
