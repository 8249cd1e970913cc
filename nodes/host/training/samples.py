"""Pictures while a training goes on: the same noise and words every time, with the adapter as it is now.

A short Euler run over the model's own noise levels through the trainer's denoiser, so that the loaded model
is used as it stands. The picture is the VAE's where one is connected and has room, else the host's rough
colours of latents.

Shapes: latents (1, C, H, W) or (1, C, T, H, W); σ (steps + 1,), falling to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from PIL import Image
from torch import Tensor

from ....spectral_core.attach.attaching import Attachment
from ..model import noise
from .defaults import usual_guidance, usual_steps
from .model import Denoiser

MOST_STEPS = 12
_SMALLEST = 256  # pixels of the shorter side of a picture made of latents' colours


@dataclass(frozen=True)
class Sampler:
    """Draws one picture whenever it is called. prompt, empty: which conditions it uses (None for an empty
    caption; ``guided`` says whether there is one). shape: of the latents. stop: asked before each step."""

    denoiser: Denoiser
    attachments: Sequence[Attachment]
    shape: tuple[int, ...]
    seed: int
    prompt: int
    guided: bool
    vae: Any
    stop: Callable[[], bool]

    def __call__(self, step: int) -> list[Image.Image]:
        with torch.no_grad():
            return [self._picture(self.latents())]

    def latents(self) -> Tensor:
        """As the model has them. KeyboardInterrupt where the user stops."""
        ready = self.denoiser.ready
        sampling, device = ready.noise.sampling, ready.device
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", self._steps()).to(device)
        start = torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed))[None].to(device)
        x = sampling.noise_scaling(sigmas[:1], start, torch.zeros_like(start), True)
        rows = [self.denoiser.conditions.rows([index], self.shape) for index in self._wanted()]
        for now, following in pairwise(sigmas):
            if self.stop():
                raise KeyboardInterrupt
            sigma = now[None]
            for attachment in self.attachments:
                attachment.set_progress(noise.progress_of(sampling, sigma))
            found = [self.denoiser.denoised(x, sigma, conditions) for conditions in rows]
            clean = found[0] if len(found) == 1 else found[1] + self._guidance() * (found[0] - found[1])
            x = x + (x - clean) / now * (following - now)  # Euler: dx/dσ = (x − D) / σ
        return sampling.inverse_noise_scaling(sigmas[-1:], x)  # type: ignore[no-any-return]

    def _wanted(self) -> list[int | None]:
        return [self.prompt, None] if self.guided and self._guidance() != 1 else [self.prompt]

    def _steps(self) -> int:
        return min(MOST_STEPS, usual_steps(self.denoiser.ready.patcher))

    def _guidance(self) -> float:
        return usual_guidance(self.denoiser.ready.patcher)

    def _picture(self, latents: Tensor) -> Image.Image:
        made_for = self.denoiser.ready.patcher.get_model_object("latent_format")
        if self.vae is not None and self._has_room(latents):
            with torch.inference_mode():  # as the host's nodes have it
                pixels = self.vae.decode(made_for.process_out(latents.clone()))
            return _image(pixels.reshape(-1, *pixels.shape[-3:])[0])
        return _rough(latents, made_for)

    def _has_room(self, latents: Tensor) -> bool:
        """Whether the VAE can be loaded without pushing out the model that trains."""
        device = self.vae.patcher.load_device
        if comfy.model_management.is_device_cpu(device):
            return True
        needed = (
            self.vae.memory_used_decode(latents.shape, self.vae.vae_dtype) + self.vae.patcher.model_size()
        )
        return bool(comfy.model_management.get_free_memory(device) > 1.2 * needed)


def _image(pixels: Tensor) -> Image.Image:
    """(H, W, 3) in [0, 1]."""
    return Image.fromarray((pixels.float().cpu().clamp(0, 1) * 255).round().byte().numpy())


def _rough(latents: Tensor, latent_format: Any) -> Image.Image:
    """A linear guess at the colours, as the host's fastest preview makes it; grey where it knows none."""
    cells = latents[0].float().cpu()
    cells = cells[:, 0] if cells.dim() == 4 else cells
    factors = getattr(latent_format, "latent_rgb_factors", None)
    if factors is None or len(factors) != len(cells):
        colours = cells.mean(0)[..., None].expand(-1, -1, 3)
    else:
        colours = cells.movedim(0, -1) @ torch.tensor(factors)
        bias = getattr(latent_format, "latent_rgb_factors_bias", None)
        colours = colours if bias is None else colours + torch.tensor(bias)
    picture = _image((colours + 1) / 2)
    scale = max(1, round(_SMALLEST / min(picture.size)))
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.BICUBIC)
