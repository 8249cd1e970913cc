"""The denoiser, trained on the pre-encoded latents under the states of the frozen text encoder.

v-prediction (Salimans & Ho, 2022) with the loss weight min(1, max(5 / snr, 0.1)): full weight where the noise
is strong and shape and colour are decided, less on the last details (in the spirit of min-SNR, Hang et al.,
2023); captions dropped to "" one time in ten for classifier-free guidance (Ho & Salimans, 2022).

The text encoder is frozen for a measured reason: trained along, it kept the background (the first thing that
lowers the loss) and forgot shape and position, from 19 % and 16 % of its states' variance to 2 % and 1 %.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from demo_model import draw
from spectral_core.whole_file import whole_file

from .common import (
    CACHE,
    MODEL,
    SEED,
    Budget,
    average_gradients,
    batches,
    contact_sheet,
    scenes,
    update_average,
)
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
LOCAL_NOTES = ("_name_or_path", "is_local", "local_files_only")
EMPTY_CAPTIONS = 0.1
STEPS_TRAINED, BATCH, LEARNING_RATE = 9000, 32, 1.5e-3


def build_pipeline(unet: nn.Module, text: nn.Module, device: str = "cpu") -> StableDiffusionPipeline:
    """The whole pipeline around these two; the autoencoder and the tokenizer come from ``demo_model``."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().to(device)
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
        self.text = text_model(self.tokenizer).to(device).eval().requires_grad_(False)
        self.text.load_state_dict(torch.load(CACHE / "text.pt", map_location=device, weights_only=True))
        self.unet = UNet2DConditionModel(**CONFIG).to(device, memory_format=torch.channels_last).train()
        for name, module in self.unet.named_modules():  # residual branches start at zero
            if name.endswith(("conv2", "proj_out", "conv_out")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.average = copy.deepcopy(self.unet).eval()
        self.optimiser = torch.optim.AdamW(
            self.unet.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01
        )
        alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
        self.a, self.s = alphas.sqrt().to(device), (1 - alphas).sqrt().to(device)
        snr = alphas / (1 - alphas)
        self.weight = (5 / snr).clamp(0.1, 1).to(device)

    def tokens(self, captions: list[str]) -> Tensor:
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids.to(self.device)

    def times(self, count: int) -> Tensor:
        """Mostly where the noise still hides the object, so that the text must place and shape it."""
        early, anywhere = torch.randint(650, 1000, (count,)), torch.randint(0, 1000, (count,))
        return torch.where(torch.rand(count) < 0.6, early, anywhere).to(self.device)

    def loss(self, latents: Tensor, context: Tensor) -> Tensor:
        t = self.times(len(latents))
        noise = torch.randn_like(latents)
        a, s = self.a[t].view(-1, 1, 1, 1), self.s[t].view(-1, 1, 1, 1)
        output = self.unet(a * latents + s * noise, t, context).sample
        error = (output - (a * noise - s * latents)).square().mean(dim=(1, 2, 3))
        return (error * self.weight[t]).sum() / self.weight[t].sum()

    @torch.no_grad()
    def text_states(self, captions: list[str]) -> Tensor:
        """The text encoder's states for these captions, (N, 77, 128) in fp16 on the CPU."""
        parts = [captions[i : i + 200] for i in range(0, len(captions), 200)]
        return torch.cat([self.text(self.tokens(part)).last_hidden_state.half().cpu() for part in parts])

    def update(self, loss: Tensor, factor: float, workers: int = 1) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * factor
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if workers > 1:
            average_gradients(list(self.unet.parameters()))
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimiser.step()
        update_average(self.average, self.unet, self.step)
        self.step += 1

    def save(self, seconds: float) -> None:
        state = {
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": seconds,
        }
        with whole_file(CHECKPOINT) as stream:
            torch.save(state, stream)

    def resume(self) -> None:
        if not CHECKPOINT.exists():
            return
        state = torch.load(CHECKPOINT, map_location=self.device, weights_only=True)
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.spent = state["step"], state["seconds"]

    def look(self) -> None:
        """A contact sheet of held-out prompts from the averaged weights, into the cache."""
        rng = np.random.default_rng(7)
        prompts = [draw.full_caption(draw.random_scene(rng, evaluation=True)) for _ in range(24)]
        images = sample(build_pipeline(self.average, self.text, self.device), prompts, 7)
        sheet = Image.fromarray(contact_sheet(images))
        sheet.resize((sheet.width * 2, sheet.height * 2), 0).save(CACHE / f"look_{self.step:05d}.png")
        (CACHE / "look.txt").write_text("\n".join(prompts))


class Source:
    """One worker's share of the batches: latents and the states of their captions, each encoded once."""

    def __init__(self, trainer: Trainer, size: int, rank: int = 0, workers: int = 1) -> None:
        self.device, self.share = trainer.device, slice(rank, None, workers)
        self.data = torch.load(CACHE / "latents.pt", weights_only=True)
        known, captions = scenes()[: len(self.data["mean"])], np.random.default_rng(SEED + 4)
        self.states = trainer.text_states([*(draw.caption(s, captions) for s in known), ""])
        self.rng = np.random.default_rng([SEED + 2, trainer.step, rank])
        self.stream = batches(len(known), size, SEED + 3 + trainer.step)

    def batch(self) -> tuple[Tensor, Tensor]:
        index = next(self.stream)[self.share]
        mean, std = self.data["mean"][index], self.data["std"][index]
        latents = (mean + std * torch.randn_like(std)).to(self.device, memory_format=torch.channels_last)
        empty = self.rng.random(len(index)) < EMPTY_CAPTIONS
        return latents, self.states[np.where(empty, -1, index)].float().to(self.device)


def train(device: str, steps: int = STEPS_TRAINED, *, rank: int = 0, workers: int = 1) -> None:
    """Train up to ``steps``, from the last checkpoint if there is one; the first worker saves and exports."""
    trainer = Trainer(device, LEARNING_RATE)
    trainer.resume()
    torch.manual_seed(SEED + 100 * trainer.step + rank)
    budget, source = Budget(steps, 600, spent=trainer.spent), Source(trainer, BATCH, rank, workers)
    saved, running = budget.seconds(), 0.0
    while trainer.step < steps:
        loss = trainer.loss(*source.batch())
        trainer.update(loss, budget.factor(trainer.step), workers)
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if rank == 0 and trainer.step % 50 == 0:
            print(f"unet {trainer.step} loss {running:.4f} {budget.seconds():.0f}s", flush=True)
        if rank == 0 and budget.seconds() - saved > 240:
            trainer.save(budget.seconds())
            trainer.look()
            saved = budget.seconds()
    if rank == 0:
        trainer.save(budget.seconds())
        times = {"steps": trainer.step, "seconds": round(budget.seconds())}
        (CACHE / "unet_time.json").write_text(json.dumps(times))
        export(trainer)


def export(trainer: Trainer) -> None:
    unet, text = copy.deepcopy(trainer.average), copy.deepcopy(trainer.text)
    pipeline = build_pipeline(unet.half().cpu(), text.half().cpu())
    pipeline.vae.half()
    pipeline.save_pretrained(MODEL, safe_serialization=True)
    for path in MODEL.glob("*/*.json"):  # what the libraries note about the machine that saved it
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = {k: v for k, v in found.items() if k not in LOCAL_NOTES}
        if kept != found:
            path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
