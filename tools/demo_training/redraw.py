"""Latents as the sampler leaves them, and the pictures they stand for: what the decoder learns from last.

A training picture's latents get the noise of one of the sampler's last steps, and the sampler goes on from
there: the picture stays, its edges become the denoiser's. A decoder that has seen such latents draws the edge
that was meant.

Shapes: latents (N, 4, 16, 16), unscaled, in half precision.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from demo_model import pictures as shown
from spectral_core.whole_file import whole_file

from .autoencoder import REDRAWN, SCALING, encode
from .common import MODEL, SEED, known, pictures
from .quick import quicken
from .text import load_tokenizer
from .unet import GUIDANCE, SCHEDULE, STEPS, load_text, load_vae, states_of

LATEST = 6  # steps of the sampler, at most: from a signal-to-noise ratio of 1
COUNTS = {"pictures": 2400, "doodles": 1600}
BATCH = 40


class Redrawing:
    """The denoiser, its sampler's last steps, and the states of captions."""

    def __init__(self, device: str) -> None:
        self.device, self.tokenizer, self.text = device, load_tokenizer(), load_text().to(device)
        self.unet = UNet2DConditionModel.from_pretrained(MODEL / "unet").float().to(device).eval()
        quicken(self.unet)
        self.sampler = DDIMScheduler(**SCHEDULE)
        self.sampler.set_timesteps(STEPS)

    @torch.no_grad()
    def __call__(self, latents: Tensor, captions: list[str], steps: int) -> Tensor:
        """Scaled latents after that many last steps of the sampler, guided as samples are."""
        context = states_of([*captions, *[""] * len(captions)], self.tokenizer, self.text)
        times = self.sampler.timesteps[-steps:]
        x = self.sampler.add_noise(latents, torch.randn_like(latents), times[:1])
        for t in times:
            with torch.autocast(self.device, torch.bfloat16):
                both = self.unet(torch.cat([x, x]), t, context).sample.float()
            asked, free = both.chunk(2)
            x = self.sampler.step(free + GUIDANCE * (asked - free), t, x).prev_sample
        return x


def redraw(device: str) -> None:
    """Write the latents into the cache: of pictures under their captions, of doodles under none."""
    torch.manual_seed(SEED + 9)
    rng, redrawing, vae = np.random.default_rng(SEED + 9), Redrawing(device), quicken(load_vae(device))
    out: dict[str, Tensor] = {}
    for name, count in COUNTS.items():
        drawn, parts = pictures(name)[:count], []
        captions = [""] * count if name == "doodles" else [shown.full_caption(p) for p in known(count)]
        for i in range(0, count, BATCH):
            latents = encode(vae, drawn[i : i + BATCH], device).to(device) * SCALING
            steps = int(rng.integers(1, LATEST + 1))
            parts.append(redrawing(latents, captions[i : i + BATCH], steps).cpu() / SCALING)
            print(f"redrawn {name} {i}", flush=True)
        out[name] = torch.cat(parts).half()
    with whole_file(REDRAWN) as stream:
        torch.save(out, stream)
