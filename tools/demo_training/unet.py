"""The denoiser, trained on pre-encoded latents under the states of the frozen text encoder.

v-prediction (Salimans & Ho, 2022) with the loss weight min(1, max(5 / snr, 0.1)): full weight where the noise
is strong and shape and colour are decided, less on the last details (in the spirit of min-SNR, Hang et al.,
2023); captions dropped to "" one time in ten for classifier-free guidance (Ho & Salimans, 2022).

The text encoder is frozen for a measured reason: trained along, it kept the background (the first thing that
lowers the loss) and forgot shape and position, from 19 % and 16 % of its states' variance to 2 % and 1 %.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from demo_model import pictures
from demo_model.pictures import PIXELS
from spectral_core.whole_file import whole_file

from .autoencoder import SCALING, encode
from .common import (
    CACHE,
    CREATURES,
    MODEL,
    SEED,
    Budget,
    average_gradients,
    batches,
    contact_sheet,
    forget_this_machine,
    known,
    note,
    picture,
    progress,
    update_average,
)
from .quick import quicken
from .text import load_tokenizer

CHECKPOINT = CACHE / "unet.pt"
ENCODED, ENCODED_WIDE = 24_000, 6_000  # pictures
WIDE_EVERY = 4  # batches: one of wide pictures
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
EMPTY_CAPTIONS = 0.1
EARLY = 0.35  # of the times
LOOK_EVERY = 500
STEPS_TRAINED, BATCH, LEARNING_RATE, DECAY = 13_000, 32, 1e-3, 0.999


def build_pipeline(unet: nn.Module, text: nn.Module, device: str = "cpu") -> StableDiffusionPipeline:
    """The whole pipeline around these two; the autoencoder and the tokenizer come from the folder."""
    pipeline = StableDiffusionPipeline(
        vae=load_vae(device), text_encoder=text, tokenizer=load_tokenizer(), unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int = STEPS, width: int = PIXELS
) -> Tensor:
    """One picture per prompt -> (N, 3, 128, width) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    result = pipeline(
        prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator, output_type="pt",
        height=PIXELS, width=width,
    )  # fmt: skip
    return result.images.float().cpu()


class Trainer:
    """Everything that a checkpoint holds, and one training step."""

    def __init__(self, device: str, lr: float) -> None:
        torch.manual_seed(SEED)
        self.device, self.lr = device, lr
        self.tokenizer = load_tokenizer()
        self.text = load_text().to(device)
        self.unet = UNet2DConditionModel.from_pretrained(MODEL / "unet").float().to(device).train()
        found = progress().get("unet", {"steps": 0, "seconds": 0})
        self.step, self.spent = found["steps"], float(found["seconds"])
        self.unet.set_attn_processor(AttnProcessor())  # so small, plain products are quicker on a processor
        quicken(self.unet)
        self.average = copy.deepcopy(self.unet).eval()
        self.optimiser = torch.optim.AdamW(
            self.unet.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
        self.a, self.s = alphas.sqrt().to(device), (1 - alphas).sqrt().to(device)
        snr = alphas / (1 - alphas)
        self.weight = (5 / snr).clamp(0.1, 1).to(device)

    def times(self, count: int) -> Tensor:
        """Rather where the noise still hides the object, so that the text must place and shape it."""
        early, anywhere = torch.randint(500, 1000, (count,)), torch.randint(0, 1000, (count,))
        return torch.where(torch.rand(count) < EARLY, early, anywhere).to(self.device)

    def loss(self, latents: Tensor, context: Tensor) -> Tensor:
        t = self.times(len(latents))
        noise = torch.randn_like(latents)
        a, s = self.a[t].view(-1, 1, 1, 1), self.s[t].view(-1, 1, 1, 1)
        with torch.autocast(self.device, torch.bfloat16):
            output = self.unet(a * latents + s * noise, t, context).sample
        error = (output.float() - (a * noise - s * latents)).square().mean(dim=(1, 2, 3))
        return (error * self.weight[t]).sum() / self.weight[t].sum()

    @torch.no_grad()
    def text_states(self, captions: list[str]) -> Tensor:
        """The text encoder's states for these captions, (N, 77, 128)."""
        return states_of(captions, self.tokenizer, self.text)

    def update(self, loss: Tensor, factor: float, workers: int = 1) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * factor
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if workers > 1:
            average_gradients(list(self.unet.parameters()))
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimiser.step()
        update_average(self.average, self.unet, self.step, DECAY)
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
        """From this machine's checkpoint; where none is, the folder's averaged weights are the start."""
        if not CHECKPOINT.exists():
            return
        state = torch.load(CHECKPOINT, map_location=self.device, weights_only=True)
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.spent = state["step"], state["seconds"]

    @torch.no_grad()
    def look(self) -> None:
        """A contact sheet of held-out prompts from the averaged weights, into the cache."""
        rng = np.random.default_rng(7)
        shown = [pictures.random_picture(rng, evaluation=True, pair=i % 3 == 2) for i in range(24)]
        prompts = [pictures.full_caption(p) for p in shown]
        with torch.autocast(self.device, torch.bfloat16):
            images = sample(build_pipeline(self.average, self.text, self.device), prompts, 7)
        Image.fromarray(contact_sheet(images)).save(CACHE / f"look_{self.step:05d}.png")
        (CACHE / "look.txt").write_text("\n".join(prompts))
        prompts = [
            pictures.full_caption(pictures.random_wide_picture(rng, evaluation=True)) for _ in range(12)
        ]
        with torch.autocast(self.device, torch.bfloat16):
            images = sample(
                build_pipeline(self.average, self.text, self.device), prompts, 7, width=pictures.WIDE[0]
            )
        Image.fromarray(contact_sheet(images, 6)).save(CACHE / f"look_wide_{self.step:05d}.png")


def load_text() -> CLIPTextModel:
    """The frozen text encoder as its first lesson left it in the folder."""
    model = CLIPTextModel.from_pretrained(MODEL / "text_encoder").float()
    return model.eval().requires_grad_(False)


def states_of(captions: list[str], tokenizer: CLIPTokenizer, text: CLIPTextModel) -> Tensor:
    """The frozen text encoder's last states, (N, 77, 128)."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    states: Tensor = text(ids.to(text.device)).last_hidden_state
    return states


def load_vae(device: str) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(MODEL / "vae").float().to(device).eval()


def wide_picture(number: int) -> tuple[pictures.Picture, Image.Image]:
    """The wide training picture of this number, always the same one."""
    rng = np.random.default_rng([SEED + 10, number])
    shown = pictures.random_wide_picture(rng, creatures=CREATURES)
    return shown, pictures.draw_wide(shown, rng)


def known_wide(count: int) -> list[pictures.Picture]:
    """What the first ``count`` wide pictures show."""
    rngs = (np.random.default_rng([SEED + 10, i]) for i in range(count))
    return [pictures.random_wide_picture(rng, creatures=CREATURES) for rng in rngs]


def encode_pictures(device: str) -> None:
    """Draw the denoiser's pictures and keep only their latents, scaled, in half precision, in the cache."""
    for name, draw_one, count in (
        ("latents", picture, ENCODED),
        ("latents_wide", wide_picture, ENCODED_WIDE),
    ):
        if not (CACHE / f"{name}.pt").exists():
            latents = _encode(device, draw_one, count)
            with whole_file(CACHE / f"{name}.pt") as stream:
                torch.save(latents, stream)
            print(name, tuple(latents.shape), latents.float().std(dim=(0, 2, 3)), flush=True)


@torch.no_grad()
def _encode(
    device: str, draw_one: Callable[[int], tuple[pictures.Picture, Image.Image]], count: int, part: int = 500
) -> Tensor:
    model, parts = quicken(load_vae(device)), []
    for start in range(0, count, part):
        images = np.stack([np.asarray(draw_one(i)[1]) for i in range(start, min(start + part, count))])
        with torch.autocast(device, torch.bfloat16):
            parts.append((encode(model, images, device) * SCALING).half())
        if start % 2000 == 0:
            print(f"latents {start}", flush=True)
    return torch.cat(parts)


class Source:
    """One worker's share of the batches: latents, and the states of captions that are new each time."""

    def __init__(self, trainer: Trainer, size: int, rank: int = 0, workers: int = 1) -> None:
        self.trainer, self.share = trainer, slice(rank, None, workers)
        self.rng = np.random.default_rng([SEED + 2, trainer.step, rank])
        self.square = self._set("latents", known, size, SEED + 3 + trainer.step)
        self.wide = self._set("latents_wide", known_wide, size, SEED + 11 + trainer.step)

    def _set(
        self, name: str, known: Callable[[int], list[pictures.Picture]], size: int, seed: int
    ) -> tuple[Tensor, list[pictures.Picture], Iterator[np.ndarray]]:
        latents = torch.load(CACHE / f"{name}.pt", weights_only=True, mmap=True)
        return latents, known(len(latents)), batches(len(latents), size, seed)

    def caption(self, shown: pictures.Picture) -> str:
        return "" if self.rng.random() < EMPTY_CAPTIONS else pictures.caption(shown, self.rng)

    def batch(self) -> tuple[Tensor, Tensor]:
        wide = self.trainer.step % WIDE_EVERY == WIDE_EVERY - 1
        latents, shown, stream = self.wide if wide else self.square
        index = next(stream)[self.share]
        chosen = latents[torch.from_numpy(index)].float()
        chosen = chosen.to(self.trainer.device, memory_format=torch.channels_last)
        return chosen, self.trainer.text_states([self.caption(shown[int(i)]) for i in index])


def train(device: str, steps: int = STEPS_TRAINED, *, rank: int = 0, workers: int = 1) -> None:
    """Train up to ``steps``, from the last checkpoint if there is one; the first worker saves and exports."""
    trainer = Trainer(device, LEARNING_RATE)
    trainer.resume()
    torch.manual_seed(SEED + 100 * trainer.step + rank)
    budget, source = Budget(steps, spent=trainer.spent), Source(trainer, BATCH, rank, workers)
    saved, looked, running = budget.seconds(), trainer.step, 0.0
    while trainer.step < steps:
        loss = trainer.loss(*source.batch())
        trainer.update(loss, budget.factor(trainer.step), workers)
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if rank == 0 and trainer.step % 50 == 0:
            print(f"unet {trainer.step} loss {running:.4f} {budget.seconds():.0f}s", flush=True)
        if rank == 0 and budget.seconds() - saved > 120:
            trainer.save(budget.seconds())
            saved = budget.seconds()
        if rank == 0 and trainer.step - looked >= LOOK_EVERY:
            trainer.look()
            export(trainer, budget.seconds())
            looked = trainer.step
    if rank == 0:
        trainer.save(budget.seconds())
        export(trainer, budget.seconds())


def export(trainer: Trainer, seconds: float) -> None:
    """The averaged weights in half precision and all that they need, into the folder."""
    unet, text = copy.deepcopy(trainer.average), copy.deepcopy(trainer.text)
    pipeline = build_pipeline(unet.half().cpu(), text.half().cpu())
    pipeline.vae.half()
    pipeline.save_pretrained(MODEL, safe_serialization=True)
    forget_this_machine()
    note("unet", trainer.step, seconds)
