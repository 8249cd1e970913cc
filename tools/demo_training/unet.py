"""The denoiser and the text encoder, trained together on the pre-encoded latents.

v-prediction (Salimans & Ho, 2022) with the loss weight min(1, max(5 / snr, 0.1)): full weight where the noise
is strong and shape and colour are decided, less on the last details (in the spirit of min-SNR, Hang et al.,
2023); captions drawn anew at every step, dropped to "" one time in ten for classifier-free guidance (Ho &
Salimans, 2022).
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from demo_model import draw

from .common import CACHE, MODEL, SEED, Budget, batches, contact_sheet, scenes, update_average
from .text import load_tokenizer, text_model

CHECKPOINT = CACHE / "unet.pt"
CHANNELS = (64, 64, 128)
CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": CHANNELS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": tuple(c // 32 for c in CHANNELS),  # diffusers: the NUMBER of heads
    "norm_num_groups": 32,
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
GUIDANCE, STEPS = 4.0, 20


def build_pipeline(unet: nn.Module, text: nn.Module, device: str = "cpu") -> StableDiffusionPipeline:
    """The whole pipeline around these two; the autoencoder and the tokenizer come from ``demo_model``."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32).to(device)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=load_tokenizer(), unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int = STEPS) -> Tensor:
    """One picture per prompt -> (N, 3, 64, 64) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    result = pipeline(
        prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator, output_type="pt",
        height=64, width=64,
    )  # fmt: skip
    return result.images.float().cpu()


class Trainer:
    """Everything that a checkpoint holds, and one training step."""

    def __init__(self, device: str, lr: float) -> None:
        torch.manual_seed(SEED)
        self.device, self.lr, self.step, self.spent = device, lr, 0, 0.0
        self.tokenizer = load_tokenizer()
        self.text = text_model(self.tokenizer).to(device).train()
        self.text.load_state_dict(torch.load(CACHE / "text.pt", map_location=device, weights_only=True))
        self.unet = UNet2DConditionModel(**CONFIG).to(device, memory_format=torch.channels_last).train()
        for name, module in self.unet.named_modules():  # residual branches start at zero
            if name.endswith(("conv2", "proj_out", "conv_out")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.average = nn.ModuleList([copy.deepcopy(self.unet), copy.deepcopy(self.text)]).eval()
        self.models = nn.ModuleList([self.unet, self.text])
        self.optimiser = torch.optim.AdamW(
            self.models.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01
        )
        alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
        self.a, self.s = alphas.sqrt().to(device), (1 - alphas).sqrt().to(device)
        snr = alphas / (1 - alphas)
        self.weight = (5 / snr).clamp(0.1, 1).to(device)

    def tokens(self, captions: list[str]) -> Tensor:
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids.to(self.device)

    def loss(self, latents: Tensor, captions: list[str]) -> Tensor:
        late = torch.rand(len(latents), device=self.device) < 0.2  # one in five on the last details
        t = torch.where(
            late,
            torch.randint_like(late, 0, 250, dtype=torch.long),
            torch.randint_like(late, 250, 1000, dtype=torch.long),
        )
        noise = torch.randn_like(latents)
        a, s = self.a[t].view(-1, 1, 1, 1), self.s[t].view(-1, 1, 1, 1)
        context = self.text(self.tokens(captions)).last_hidden_state
        output = self.unet(a * latents + s * noise, t, context).sample
        error = (output - (a * noise - s * latents)).square().mean(dim=(1, 2, 3))
        return (error * self.weight[t]).sum() / self.weight[t].sum()

    def update(self, loss: Tensor, factor: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * factor
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.models.parameters(), 1.0)
        self.optimiser.step()
        update_average(self.average, self.models, self.step)
        self.step += 1

    def save(self, seconds: float) -> None:
        state = {
            "models": self.models.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": seconds,
        }
        temporary = CHECKPOINT.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, CHECKPOINT)

    def resume(self) -> None:
        if not CHECKPOINT.exists():
            return
        state = torch.load(CHECKPOINT, map_location=self.device, weights_only=True)
        self.models.load_state_dict(state["models"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.spent = state["step"], state["seconds"]

    def look(self) -> None:
        """A contact sheet of held-out prompts from the averaged weights, into the cache."""
        rng = np.random.default_rng(7)
        prompts = [draw.full_caption(draw.random_scene(rng, evaluation=True)) for _ in range(24)]
        images = sample(build_pipeline(self.average[0], self.average[1], self.device), prompts, 7)
        sheet = Image.fromarray(contact_sheet(images))
        sheet.resize((sheet.width * 2, sheet.height * 2), 0).save(CACHE / f"look_{self.step:05d}.png")
        (CACHE / "look.txt").write_text("\n".join(prompts))


def train(device: str, steps: int = 9000, minutes: float = 42.0, size: int = 32, lr: float = 1.5e-3) -> None:
    """Train, checkpoint every four minutes, write the averaged weights as fp16 under ``demo_model``."""
    Path("/tmp/unet_training.pid").write_text(str(os.getpid()))
    data = torch.load(CACHE / "latents.pt", weights_only=True)
    known, rng = scenes()[: len(data["mean"])], np.random.default_rng(SEED + 2)
    trainer = Trainer(device, lr)
    trainer.resume()
    budget = Budget(steps, minutes, spent=trainer.spent)
    stream = batches(len(known), size, SEED + 3 + trainer.step)
    saved, running = budget.seconds(), 0.0
    while budget.progress(trainer.step) < 1:
        index = next(stream)
        captions = [draw.caption(known[i], rng) if rng.random() > 0.1 else "" for i in index]
        mean, std = data["mean"][index], data["std"][index]
        latents = (mean + std * torch.randn_like(std)).to(device, memory_format=torch.channels_last)
        loss = trainer.loss(latents, captions)
        trainer.update(loss, budget.factor(trainer.step))
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if trainer.step % 50 == 0:
            print(f"unet {trainer.step} loss {running:.4f} {budget.seconds():.0f}s", flush=True)
        if budget.seconds() - saved > 240:
            trainer.save(budget.seconds())
            trainer.look()
            saved = budget.seconds()
    trainer.save(budget.seconds())
    times = {"steps": trainer.step, "seconds": round(budget.seconds())}
    (CACHE / "unet_time.json").write_text(json.dumps(times))
    export(trainer)


def export(trainer: Trainer) -> None:
    unet, text = copy.deepcopy(trainer.average[0]), copy.deepcopy(trainer.average[1])
    pipeline = build_pipeline(unet.half().cpu(), text.half().cpu())
    pipeline.vae.half()
    pipeline.save_pretrained(MODEL, safe_serialization=True)
