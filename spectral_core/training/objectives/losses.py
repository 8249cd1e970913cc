"""What is trained on what, and the loss of a batch: any callable model, attached adapters, latents.

loss = mean over the batch of w(t) · Σ m·(prediction − target)² / Σ m, with the weight w of the noise level
and the mask m, where there are some.

Shapes: latents (N, C, H, W), or a sequence of (C, H, W) in several sizes, scaled as the model wants them;
masks (1, H, W); the model maps (noisy, timesteps, example indices with None for a dropped caption) to a
prediction of the latents' shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from ...attach.attaching import Attachment
from ...errors import SpectralAdapterError
from ..config.config import TrainConfig
from ..data.order import Order
from .diffusion import NoiseProcess

Denoiser = Callable[[Tensor, Tensor, Sequence["int | None"]], Tensor]
_MASK_FLOOR = 1e-3  # a mask that is all black counts for next to nothing instead of dividing by zero


@dataclass(frozen=True)
class Setup:
    """What is trained and on what: latents, their order, the model and its noise.

    tokens: trained word embeddings. masks: per example, None for the whole picture. prior: the order of the
    prior examples (among the same latents), a batch of which joins every batch. roots: the trees in which
    gradient checkpointing happens.
    """

    denoiser: Denoiser
    latents: Tensor | Sequence[Tensor]
    order: Order
    diffusion: NoiseProcess
    attachments: Sequence[Attachment]
    tokens: Sequence[nn.Parameter] = ()
    masks: Sequence[Tensor | None] | None = None
    prior: Order | None = None
    roots: Sequence[nn.Module] = ()


@dataclass(frozen=True)
class Batch:
    """Rows of one shape: examples, their captions (None where dropped), noise levels, noise, and the weight
    of their loss."""

    indices: tuple[int, ...]
    captions: tuple[int | None, ...]
    timesteps: Tensor
    noise: Tensor
    weight: float = 1.0

    def rows(self, part: slice) -> Batch:
        return Batch(
            self.indices[part], self.captions[part], self.timesteps[part], self.noise[part], self.weight
        )


def rows_of(latents: Tensor | Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    """The latents of some examples, (B, C, H, W)."""
    if isinstance(latents, Tensor):
        return latents[list(indices)]
    return torch.stack([latents[i] for i in indices])


def draw(setup: Setup, config: TrainConfig, generator: torch.Generator, processes: int = 1) -> list[Batch]:
    """The batches of one optimiser step, for all processes together.

    Every number is drawn for the step as a whole, sample after sample, so that neither the number of
    processes nor the accumulation decides which noise a sample gets.
    """
    sources = [(setup.order, 1.0)]
    if setup.prior is not None:
        sources.append((setup.prior, config.prior_weight))
    picks = [
        (order.next(order.batch_size * processes), weight)
        for _ in range(config.accumulation)
        for order, weight in sources
    ]
    indices = [i for batch, _ in picks for i in batch]
    shapes = [tuple(setup.latents[i].shape) for i in indices]
    timesteps = setup.diffusion.sample_timesteps(
        len(indices), generator, config.timesteps, config.timestep_mean, config.timestep_std
    )
    sizes = [int(torch.Size(shape).numel()) for shape in shapes]
    noise = torch.randn(sum(sizes), generator=generator).split(sizes)
    dropped = (torch.rand(len(indices), generator=generator) < config.caption_dropout).tolist()
    found, start = [], 0
    for batch, weight in picks:
        here = range(start, start + len(batch))
        start = here.stop
        captions = tuple(None if dropped[k] else indices[k] for k in here)
        rows = torch.stack([noise[k].reshape(shapes[k]) for k in here])
        found.append(Batch(tuple(batch), captions, timesteps[here.start : here.stop], rows, weight))
    return found


def denoising_loss(
    setup: Setup, indices: Sequence[int], captions: Sequence[int | None], timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of the prediction, for given timesteps (B,) and noise (B, C, H, W)."""
    return batch_loss(setup, Batch(tuple(indices), tuple(captions), timesteps, noise))[0]


def batch_loss(setup: Setup, batch: Batch, config: TrainConfig | None = None) -> tuple[Tensor, Tensor]:
    """(the loss of a batch without its own weight, the target's mean square). config: with its weighting and
    the masks."""
    latents = rows_of(setup.latents, batch.indices)
    noise, timesteps = batch.noise.to(latents), batch.timesteps.to(latents.device)
    for attachment in setup.attachments:
        attachment.set_progress(setup.diffusion.progress(timesteps))
    noisy = setup.diffusion.add_noise(latents, noise, timesteps)
    prediction = setup.denoiser(noisy, timesteps, batch.captions)
    if prediction.shape != latents.shape:
        raise SpectralAdapterError(
            f"the model predicts {tuple(prediction.shape)} from latents {tuple(latents.shape)}: expected a "
            "prediction of the latents' shape"
        )
    target = setup.diffusion.target(latents, noise, timesteps)
    square = (prediction.float() - target.float()).square()
    power = target.detach().float().square().mean()
    if config is None:
        return square.mean(), power
    masks = None if setup.masks is None else [setup.masks[i] for i in batch.indices]
    if config.weighting == "none" and (masks is None or all(m is None for m in masks)):
        return square.mean(), power
    rows = torch.stack(
        [_masked_mean(s, m) for s, m in zip(square, masks or [None] * len(square), strict=True)]
    )
    if config.weighting == "min-snr":
        rows = rows * setup.diffusion.min_snr_weights(timesteps, config.snr_gamma)
    return rows.mean(), power


def _masked_mean(square: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (C, H, W) over the mask (1, H, W)."""
    if mask is None:
        return square.mean()
    mask = mask.to(square)
    return (square * mask).mean() / mask.mean().clamp(min=_MASK_FLOOR)


@torch.no_grad()
def evaluation_loss(setup: Setup, seed: int = 1234, levels: int = 8, batch_size: int = 16) -> float:
    """The loss over every picture at ``levels`` fixed noise levels with fixed noise: comparable before and
    after."""
    generator = torch.Generator().manual_seed(seed)
    steps = setup.diffusion.levels(levels)
    cases = [(i, t) for i in range(len(setup.latents)) for t in steps]
    shapes = [tuple(setup.latents[i].shape) for i, _ in cases]
    sizes = [int(torch.Size(shape).numel()) for shape in shapes]
    noise = torch.randn(sum(sizes), generator=generator).split(sizes)
    total = 0.0
    for shape, group in groupby(range(len(cases)), key=lambda k: shapes[k]):
        places = list(group)
        for start in range(0, len(places), batch_size):
            chunk = places[start : start + batch_size]
            indices = [cases[k][0] for k in chunk]
            timesteps = torch.stack([cases[k][1] for k in chunk])
            rows = torch.stack([noise[k].reshape(shape) for k in chunk])
            total += denoising_loss(setup, indices, indices, timesteps, rows).item() * len(chunk)
    return total / len(cases)
