"""The autoencoder: 64 x 64 RGB -> 16 x 16 x 4 latents of unit variance after the usual factor 0.18215.

The encoder is written down (``autoencoder_start``) and stays; the decoder is trained on its latents with L1
on the pixels and on the differences between neighbours.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .autoencoder_start import fold, start_decoder, whitening, write_encoder
from .common import (
    CACHE,
    MODEL,
    SEED,
    Budget,
    average_gradients,
    batches,
    pictures,
    to_tensor,
    update_average,
)

SCALING = 0.18215
ENCODED = 14_000  # of the drawn scenes, for the denoiser
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (64, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 0,  # no residual blocks in the encoder's levels, one in each of the decoder's
    "norm_num_groups": 32,
    "sample_size": 64,
    "scaling_factor": SCALING,
    "force_upcast": False,
}


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def loss_of(target: Tensor, output: Tensor) -> Tensor:
    """L1 + L1 of the differences between neighbours, along both axes."""
    loss = (output - target).abs().mean()
    for a, b in zip(edges(output), edges(target), strict=True):
        loss = loss + (a - b).abs().mean()
    return loss


def build(device: str) -> None:
    """Write the encoder, whiten its latents over the scenes, start the decoder as its inverse, save all."""
    torch.manual_seed(SEED)
    model = AutoencoderKL(**CONFIG)
    write_encoder(model)
    start_decoder(model)
    raw, _ = encode(model.to(device), pictures()[:2000], device)
    matrix, offset = whitening(raw)
    fold(model.cpu(), matrix, offset, SCALING)
    model.half().save_pretrained(MODEL / "vae", safe_serialization=True)


@torch.no_grad()
def encode(model: AutoencoderKL, images: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    """uint8 pictures -> posterior mean and standard deviation, (N, 4, 16, 16) each, unscaled."""
    out = []
    for i in range(0, len(images), 100):
        x = to_tensor(images[i : i + 100]).to(device, memory_format=torch.channels_last) * 2 - 1
        posterior = model.encode(x).latent_dist
        out.append((posterior.mean.cpu(), posterior.std.cpu()))
    return torch.cat([m for m, _ in out]), torch.cat([s for _, s in out])


def encode_data(device: str) -> None:
    """Pre-encode the training scenes (already scaled) into the cache."""
    model = AutoencoderKL.from_pretrained(MODEL / "vae").float().to(device).eval()
    model.to(memory_format=torch.channels_last)
    mean, spread = encode(model, pictures()[:ENCODED], device)
    torch.save({"mean": mean * SCALING, "std": spread * SCALING}, CACHE / "latents.pt")
    print("latents", mean.shape, (mean * SCALING).std(dim=(0, 2, 3)), (spread * SCALING).mean(), flush=True)


def roughen(latents: Tensor) -> Tensor:
    """A little noise, up to an eighth of the latents' spread, as a sampler with few steps leaves it."""
    strength = 0.12 / SCALING * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    return latents + strength * torch.randn_like(latents)


def refine(device: str, steps: int = 700, size: int = 8, *, rank: int = 0, workers: int = 1) -> None:
    """Train the decoder on scenes and doodles; the encoder and so the denoiser's data stay as they are."""
    torch.manual_seed(SEED + 8 + rank)
    model = AutoencoderKL.from_pretrained(MODEL / "vae").float().to(device)
    model.to(memory_format=torch.channels_last).requires_grad_(False)
    model.decoder.requires_grad_(True)
    data = pictures(), pictures("doodles")
    average = copy.deepcopy(model.decoder)
    optimiser = torch.optim.AdamW(model.decoder.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99))
    shares = (size - size // 4, size // 4)
    streams = [batches(len(d), n, SEED + 8) for d, n in zip(data, shares, strict=True)]
    budget, step = Budget(steps, 600, warmup=20), 0
    while step < steps:
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * budget.factor(step)
        images = [d[next(s)[rank::workers]] for d, s in zip(data, streams, strict=True)]
        target = to_tensor(np.concatenate(images)).to(device) * 2 - 1
        loss = loss_of(target, model.decode(roughen(model.encode(target).latent_dist.mode())).sample)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if workers > 1:
            average_gradients(list(model.decoder.parameters()))
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimiser.step()
        update_average(average, model.decoder, step, 0.99)
        if rank == 0 and step % 20 == 0:
            print(f"refine {step} loss {loss:.4f} {budget.seconds():.0f}s", flush=True)
        step += 1
    if rank > 0:
        return
    (CACHE / "refine_time.json").write_text(json.dumps({"steps": step, "seconds": round(budget.seconds())}))
    model.decoder.load_state_dict(average.state_dict())
    model.register_to_config(_name_or_path="demo_model/vae")  # not this machine's path
    model.half().save_pretrained(MODEL / "vae", safe_serialization=True)
