"""What is trained on what, and the loss of a batch: any callable model, attached adapters, latents.

loss = mean over the batch of w(t) · Σ m·(prediction − target)² / Σ m, with the weight w of the noise level
and the mask m, where there are some.

Shapes: latents (N, C, H, W), or a sequence of (C, H, W) in several sizes, scaled as the model wants them;
masks (1, H, W); the model maps (noisy, timesteps, example indices with None for a dropped caption) to a
prediction of the latents' shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from ...attach.attaching import Attachment
from ...errors import SpectralAdapterError
from ..config.config import TrainConfig
from ..data.order import Order
from .diffusion import NoiseProcess, Shares
from .preservation import Preserved
from .towards_prediction import ResidualNoise

Denoiser = Callable[[Tensor, Tensor, Sequence["int | None"]], Tensor]
_SEEDS = 1_000_003  # apart from one seed to the next
_LEVELS = 8  # of a held-out picture
_MOST_CASES = 64  # pictures × levels of a check: as much as some twenty steps
_MASK_FLOOR = 1e-3  # a mask that is all black counts for next to nothing instead of dividing by zero


@dataclass(frozen=True)
class Setup:
    """What is trained and on what: latents, their order, the model and its noise.

    tokens: trained word embeddings. masks: per example, None for the whole picture. prior: the order of the
    prior examples (among the same latents), a batch of which joins every batch. roots: the trees in which
    gradient checkpointing happens. held_out: the examples (among the same latents) that are not trained on
    and judge the training. preserved: what the denoiser is told where the model shall stay as it is.
    recast: makes weights again that were streamed in (:mod:`..engine.checkpointing`). make_room: takes
    weights off the device; whether there were some.
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
    held_out: Sequence[int] = ()
    preserved: Preserved | None = None
    recast: Callable[[Tensor], Callable[[], Tensor] | None] | None = None
    make_room: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Batch:
    """Rows of one shape: examples, their captions (None where dropped), noise levels, noise, and the weight
    of their loss. preserves: towards what the model predicts without the adapter."""

    indices: tuple[int, ...]
    captions: tuple[int | None, ...]
    timesteps: Tensor
    noise: Tensor
    weight: float = 1.0
    preserves: bool = False

    def rows(self, part: slice) -> Batch:
        return replace(
            self,
            indices=self.indices[part],
            captions=self.captions[part],
            timesteps=self.timesteps[part],
            noise=self.noise[part],
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
    timesteps = setup.diffusion.sample_timesteps(len(indices), generator, _shares(config))
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


def _shares(config: TrainConfig) -> Shares:
    return Shares(config.timesteps, config.timestep_mean, config.timestep_std)


def draw_preserved(setup: Setup, config: TrainConfig, step: int, processes: int = 1) -> list[Batch]:
    """The batch of a step that keeps the model as it is; none where there is nothing to keep or the step is
    not due. It depends on the seed and the step alone: a resumed run draws the same."""
    if setup.preserved is None or not config.preserve_every or step % config.preserve_every:
        return []
    generator = torch.Generator().manual_seed(config.seed * _SEEDS + step)
    shown = setup.order.shown
    first = shown[int(torch.randint(len(shown), (1,), generator=generator))]
    alike = [i for i in shown if setup.latents[i].shape == setup.latents[first].shape]
    count = setup.order.batch_size * processes
    places = torch.randint(len(alike), (count,), generator=generator).tolist()
    indices = tuple(alike[place] for place in places)
    timesteps = setup.diffusion.sample_timesteps(count, generator, _shares(config))
    noise = torch.randn(count, *setup.latents[first].shape, generator=generator)
    said = setup.preserved.choose(indices, generator)
    return [Batch(indices, said, timesteps, noise, config.preserve_weight, preserves=True)]


def denoising_loss(
    setup: Setup, indices: Sequence[int], captions: Sequence[int | None], timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of the prediction, for given timesteps (B,) and noise (B, C, H, W)."""
    return batch_loss(setup, Batch(tuple(indices), tuple(captions), timesteps, noise))[0]


def batch_loss(setup: Setup, batch: Batch, config: TrainConfig | None = None) -> tuple[Tensor, Tensor]:
    """(the loss of a batch without its own weight, what predicting nothing costs). config: with its weighting
    and the masks."""
    latents = rows_of(setup.latents, batch.indices)
    noise, timesteps = batch.noise.to(latents), batch.timesteps.to(latents.device)
    for attachment in setup.attachments:
        attachment.set_progress(setup.diffusion.progress(timesteps))
    noisy = setup.diffusion.add_noise(latents, noise, timesteps)
    wanted = _without_adapter(setup, noisy, timesteps, batch.captions) if batch.preserves else None
    prediction = setup.denoiser(noisy, timesteps, batch.captions)
    if prediction.shape != latents.shape:
        raise SpectralAdapterError(
            f"the model predicts {tuple(prediction.shape)} from latents {tuple(latents.shape)}: expected a "
            "prediction of the latents' shape"
        )
    target = setup.diffusion.target(latents, noise, timesteps) if wanted is None else wanted
    square = (prediction.float() - target.float()).square()
    whole = target
    if isinstance(setup.diffusion, ResidualNoise):  # its target is 0, the model's own is not
        whole = setup.diffusion.inner.target(latents, noise, timesteps)
    power = whole.detach().float().square().mean()
    if config is None:
        return square.mean(), power
    masks = None if setup.masks is None or batch.preserves else [setup.masks[i] for i in batch.indices]
    if config.weighting == "none" and (masks is None or all(m is None for m in masks)):
        return square.mean(), power
    rows = torch.stack(
        [_masked_mean(s, m) for s, m in zip(square, masks or [None] * len(square), strict=True)]
    )
    if config.weighting == "min-snr":
        rows = rows * setup.diffusion.min_snr_weights(timesteps, config.snr_gamma)
    return rows.mean(), power


@torch.no_grad()
def _without_adapter(
    setup: Setup, noisy: Tensor, timesteps: Tensor, captions: Sequence[int | None]
) -> Tensor:
    """What the model predicts with the adapter off, to the bit; of text encoders that learn, too."""
    with ExitStack() as around:
        for attachment in setup.attachments:
            around.enter_context(attachment.off())
        return setup.denoiser(noisy, timesteps, captions)


def _masked_mean(square: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (C, H, W) over the mask (1, H, W)."""
    if mask is None:
        return square.mean()
    mask = mask.to(square)
    return (square * mask).mean() / mask.mean().clamp(min=_MASK_FLOOR)


def evaluation_loss(setup: Setup, seed: int = 1234, levels: int = 8, batch_size: int = 16) -> float:
    """The loss over every picture at ``levels`` fixed noise levels with fixed noise: comparable before and
    after."""
    steps = setup.diffusion.levels(levels)
    return _fixed_loss(setup, [(i, t) for i in range(len(setup.latents)) for t in steps], seed, batch_size)


def held_out_loss(setup: Setup, config: TrainConfig) -> float:
    """The loss over the held-out pictures, with their masks, at fixed noise levels and with fixed noise:
    comparable over the run. Each has 8 levels; of many pictures each has fewer, spread over all of them."""
    count = len(setup.held_out)
    each = max(1, min(_LEVELS, _MOST_CASES // count))
    steps = setup.diffusion.levels(_LEVELS)
    cases = [
        (i, steps[(n + k * _LEVELS // each) % _LEVELS])
        for n, i in enumerate(setup.held_out)
        for k in range(each)
    ]
    return _fixed_loss(setup, cases, config.seed, config.batch_size, replace(config, weighting="none"))


@torch.no_grad()
def _fixed_loss(
    setup: Setup,
    cases: Sequence[tuple[int, Tensor]],
    seed: int,
    batch_size: int,
    config: TrainConfig | None = None,
) -> float:
    """The mean loss of examples at noise levels, with noise that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(setup.latents[i].shape) for i, _ in cases]
    sizes = [int(torch.Size(shape).numel()) for shape in shapes]
    noise = torch.randn(sum(sizes), generator=generator).split(sizes)
    total = 0.0
    for shape, group in groupby(range(len(cases)), key=lambda k: shapes[k]):
        places = list(group)
        for start in range(0, len(places), batch_size):
            chunk = places[start : start + batch_size]
            indices = tuple(cases[k][0] for k in chunk)
            timesteps = torch.stack([cases[k][1] for k in chunk])
            rows = torch.stack([noise[k].reshape(shape) for k in chunk])
            batch = Batch(indices, indices, timesteps, rows)
            total += batch_loss(setup, batch, config)[0].item() * len(chunk)
    return total / len(cases)
