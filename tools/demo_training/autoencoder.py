"""The autoencoder: 128 x 128 RGB -> 16 x 16 x 4 latents of unit variance after the usual factor 0.18215.

The encoder is written down, not trained: the mean of every 2 x 2 pixels, of each 4 x 4 block of these the
mean colour and one vertical difference, whitened. So the denoiser's latents stay while the decoder goes on to
learn, from them with a little noise, as a sampler leaves them, or half from latents that the denoiser redrew
("decoder"). Its loss, L1 + L2 / 2 + half of the L1 on the differences between neighbours, keeps edges sharp.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from demo_model import draw
from demo_model.pictures import PIXELS, draw_picture, random_picture
from spectral_core.whole_file import whole_file

from .common import (
    CACHE,
    MODEL,
    SEED,
    Budget,
    average_gradients,
    batches,
    contact_sheet,
    forget_this_machine,
    note,
    pictures,
    progress,
    to_tensor,
    update_average,
)
from .quick import quicken

SCALING = 0.18215
STEPS, DECODER_STEPS, BATCH, LEARNING_RATE, DECAY = 2500, 1500, 8, 1e-3, 0.98
NOISE = 0.06  # the most, of the latents' spread
# Latents as the sampler leaves them, {"pictures": (N, 4, 16, 16), "doodles": ...}.
REDRAWN = CACHE / "redrawn.pt"


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def loss_of(target: Tensor, output: Tensor) -> Tensor:
    """L1 + L2 / 2, and half of the L1 of the differences between neighbours along both axes."""
    difference = output.float() - target
    steep = [d.abs().mean() for d in edges(difference)]
    return difference.abs().mean() + 0.5 * difference.square().mean() + 0.5 * (steep[0] + steep[1])


def roughen(latents: Tensor) -> Tensor:
    """A little noise in proportion to each channel's spread, as a sampler with few steps leaves it."""
    spread = latents.detach().float().std(dim=(0, 2, 3), keepdim=True)
    strength = NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    return latents + strength * spread * torch.randn_like(latents)


def psnr(target: Tensor, output: Tensor) -> float:
    """The mean over the pictures, both in [-1, 1]."""
    mse = ((output.float().clamp(-1, 1) - target) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * mse.log10()).mean())


def examples() -> dict[str, Tensor]:
    """What the training never shows: the demo's characters, and held-out pictures."""
    rng = np.random.default_rng(SEED + 20)
    seeds = [(name, seed) for name in draw.CONCEPTS for seed in range(6)]
    characters = [draw.draw_concept(name, seed, pixels=PIXELS)[0] for name, seed in seeds]
    held_out = [draw_picture(random_picture(rng, evaluation=True), rng) for _ in range(24)]
    sets = {"characters": characters, "pictures": held_out}
    return {name: to_tensor(np.stack([np.asarray(p) for p in each])) * 2 - 1 for name, each in sets.items()}


class Trainer:
    """The model, its average, what a checkpoint holds and one training step. ``part`` is what is trained."""

    def __init__(self, device: str, part: str) -> None:
        self.device, self.part, self.step, self.spent = device, part, 0, 0.0
        self.checkpoint = CACHE / f"{part}.pt"
        found = progress()
        self.model = AutoencoderKL.from_pretrained(MODEL / "vae").float().to(device)
        if part in found:
            self.step, self.spent = found[part]["steps"], float(found[part]["seconds"])
        quicken(self.model)
        self.model.encoder.requires_grad_(False)
        self.model.quant_conv.requires_grad_(False)
        self.average = copy.deepcopy(self.model).eval()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.trained, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.99), fused=True
        )
        self.examples = {name: x.to(device) for name, x in examples().items()}

    def save(self, seconds: float) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": seconds,
        }
        with whole_file(self.checkpoint) as stream:
            torch.save(state, stream)

    def resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.spent = state["step"], state["seconds"]

    def update(self, target: Tensor, factor: float, workers: int, redrawn: Tensor | None = None) -> float:
        """One step; ``redrawn``: latents of the same pictures, for half of the batch."""
        for group in self.optimiser.param_groups:
            group["lr"] = LEARNING_RATE * factor
        with torch.autocast(self.device, torch.bfloat16):
            with torch.no_grad():
                latents = roughen(self.model.encode(target).latent_dist.mode())
            if redrawn is not None:
                chosen = torch.rand(len(latents), 1, 1, 1, device=latents.device) < 0.5
                latents = torch.where(chosen, redrawn.to(latents), latents)
            output = self.model.decode(latents).sample
        loss = loss_of(target, output)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if workers > 1:
            average_gradients(self.trained)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        update_average(self.average, self.model, self.step, DECAY)
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """PSNR in dB of what the averaged weights give back, and a sheet of examples over it in the cache."""
        found = {}
        for name, target in self.examples.items():
            with torch.autocast(self.device, torch.bfloat16):
                output = self.average.decode(self.average.encode(target).latent_dist.mode()).sample.float()
            found[name] = round(psnr(target, output), 2)
            sheet = contact_sheet(torch.cat([target[::3], output[::3]]) / 2 + 0.5)
            Image.fromarray(sheet).save(CACHE / f"{self.part}_{name}.png")
        return found


def train(
    device: str, steps: int = STEPS, part: str = "autoencoder", *, rank: int = 0, workers: int = 1
) -> None:
    """Train up to ``steps`` from the last checkpoint if there is one; the first worker saves and exports."""
    trainer = Trainer(device, part)
    trainer.resume()
    torch.manual_seed(SEED + 8 + 100 * trainer.step + rank)
    data, shares = (pictures(), pictures("doodles")), (BATCH - BATCH * 3 // 8, BATCH * 3 // 8)
    redrawn: list[Tensor] = []
    if part == "decoder":
        redrawn = list(torch.load(REDRAWN, weights_only=True).values())
        data = tuple(d[: len(r)] for d, r in zip(data, redrawn, strict=True))
    streams = [batches(len(d), n, SEED + 8 + trainer.step) for d, n in zip(data, shares, strict=True)]
    budget, saved = Budget(steps, spent=trainer.spent, warmup=20), 0.0
    while trainer.step < steps:
        chosen = [next(s) for s in streams]
        images = np.concatenate([d[i] for d, i in zip(data, chosen, strict=True)])[rank::workers]
        latents = [r[torch.from_numpy(i)] for r, i in zip(redrawn, chosen, strict=False)]
        loss = trainer.update(
            to_tensor(images).to(device) * 2 - 1,
            budget.factor(trainer.step),
            workers,
            torch.cat(latents)[rank::workers] if latents else None,
        )
        if rank == 0 and trainer.step % 20 == 0:
            print(f"{part} {trainer.step} loss {loss:.4f} {budget.seconds():.0f}s", flush=True)
        if rank == 0 and (trainer.step in (50, steps) or trainer.step % 100 == 0):
            print(f"{part} {trainer.step} dB {trainer.look()} {budget.seconds():.0f}s", flush=True)
            export(trainer, budget.seconds())
        if rank == 0 and (budget.seconds() - saved > 60 or trainer.step == steps):
            trainer.save(budget.seconds())
            saved = budget.seconds()


@torch.no_grad()
def encode(model: AutoencoderKL, images: np.ndarray, device: str) -> Tensor:
    """uint8 pictures -> latents (the posterior's mean), (N, 4, 16, 16), unscaled, fp32 on the CPU."""
    out = []
    for i in range(0, len(images), 50):
        x = to_tensor(images[i : i + 50]).to(device, memory_format=torch.channels_last) * 2 - 1
        out.append(model.encode(x).latent_dist.mode().float().cpu())
    return torch.cat(out)


def export(trainer: Trainer, seconds: float) -> None:
    """The averaged weights in half precision into the folder."""
    model = copy.deepcopy(trainer.average).cpu().float()
    model.register_to_config(sample_size=PIXELS)
    model.half().save_pretrained(MODEL / "vae", safe_serialization=True)
    forget_this_machine()
    note(trainer.part, trainer.step, seconds)
