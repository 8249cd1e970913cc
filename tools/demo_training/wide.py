"""An autoencoder of 128 x 128 pixels over the latents of the demo model's first version (64 x 64).

Its encoder is exact: the mean of every 2 x 2 pixels, then the first version's, so that its latents, denoiser,
adapters and fingerprints stay what they are; 128 pixels are 16 latent cells, as ComfyUI's Empty Latent Image
counts them. Its decoder starts as the first version's with one level more and is trained on pixels and edges.

Shapes: pictures (N, 3, 128, 128) in [-1, 1]; latents (N, 4, 16, 16).
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from diffusers import AutoencoderKL

from .autoencoder import BATCH, examples, loss_of, quality, roughen
from .common import (
    MODEL,
    START,
    Budget,
    batches,
    forget_this_machine,
    note,
    pictures,
    to_tensor,
    update_average,
)
from .quick import quicken

FOLDER = MODEL / "vae_128"
STEPS, LEARNING_RATE, DECAY, SEED = 1000, 1e-3, 0.98, 7


def widened(first: AutoencoderKL) -> AutoencoderKL:
    """``first`` with a level more on the side of the pixels: an exact encoder, a decoder to be trained."""
    config = {name: value for name, value in first.config.items() if not name.startswith("_")}
    levels = len(config["block_out_channels"])
    config |= {
        "block_out_channels": (*config["block_out_channels"], config["block_out_channels"][-1]),
        "down_block_types": ("DownEncoderBlock2D",) * (levels + 1),
        "up_block_types": ("UpDecoderBlock2D",) * (levels + 1),
        "sample_size": 2 * config["sample_size"],
    }
    model = AutoencoderKL(**config)
    weights, last = model.state_dict(), levels - 1
    for name, value in first.state_dict().items():
        if name.startswith("encoder.down_blocks."):
            step = int(name.split(".")[2])
            weights[name.replace(f"blocks.{step}.", f"blocks.{step + 1}.", 1)] = value
        elif name.startswith(f"decoder.up_blocks.{last}."):
            weights[name.replace(f"blocks.{last}.", f"blocks.{levels}.", 1)] = value
            weights[name] = (
                torch.zeros_like(value) if ".conv2." in name else value
            )  # a branch that adds nothing
        else:
            weights[name] = value
    channels = torch.arange(config["block_out_channels"][0])
    mean, same = (torch.zeros(len(channels), len(channels), 3, 3) for _ in range(2))
    mean[channels, channels, :2, :2] = 0.25
    same[channels, channels, 1, 1] = 1
    for place, kernel in (("encoder.down_blocks.0.down", mean), (f"decoder.up_blocks.{last}.up", same)):
        weights[f"{place}samplers.0.conv.weight"] = kernel
        weights[f"{place}samplers.0.conv.bias"] = torch.zeros(len(channels))
    model.load_state_dict(weights)
    return model


def train(device: str, steps: int = STEPS) -> None:
    """Train the decoder (0.45 seconds a step on two cores) and write the averaged weights as float16."""
    torch.manual_seed(SEED)
    model = widened(AutoencoderKL.from_pretrained(START / "vae").float()).to(device)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    quicken(model)
    average = copy.deepcopy(model).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    data, shares = (pictures(), pictures("doodles")), (BATCH - BATCH * 3 // 8, BATCH * 3 // 8)
    streams = [batches(len(d), n, SEED) for d, n in zip(data, shares, strict=True)]
    shown = {name: each.to(device) for name, each in examples().items()}
    budget = Budget(steps, warmup=20)
    print("vae_128 0", quality(average, shown, "vae_128"), flush=True)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * budget.factor(step)
        images = np.concatenate([d[next(s)] for d, s in zip(data, streams, strict=True)])
        target = to_tensor(images).to(device) * 2 - 1
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                latents = roughen(model.encode(target).latent_dist.mode())
            loss = loss_of(target, model.decode(latents).sample)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        update_average(average, model, step, DECAY)
        if (step + 1) % 100 == 0:
            print(
                f"vae_128 {step + 1} dB {quality(average, shown, 'vae_128')} {budget.seconds():.0f}s",
                flush=True,
            )
    average.half().save_pretrained(FOLDER)
    forget_this_machine()
    note("vae_128", steps, budget.seconds())
