"""The training loop: any callable model, attached adapters, latents; nothing here knows a pipeline or a host.

Shapes: latents (N, C, H, W) scaled as the model wants them; the model maps (noisy, timesteps, example
indices with None for a dropped caption) to a prediction of the latents' shape.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import Attachment
from ..errors import SpectralAdapterError
from .config import TrainConfig
from .data import Order
from .diffusion import Diffusion

Denoiser = Callable[[Tensor, Tensor, Sequence[int | None]], Tensor]
Listener = Callable[[dict[str, Any]], None]


@dataclass
class TrainResult:
    """losses per step, seconds, and whether the run was stopped before its last step."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False


@dataclass(frozen=True)
class Setup:
    """What is trained and on what: latents (N, C, H, W), their order, the model and its noise."""

    denoiser: Denoiser
    latents: Tensor
    order: Order
    diffusion: Diffusion
    attachments: Sequence[Attachment]
    tokens: Sequence[nn.Parameter] = ()


def train(setup: Setup, config: TrainConfig, method: str, listener: Listener | None = None) -> TrainResult:
    """Train the attachments' parameters (and token rows) for ``config.steps`` steps.

    KeyboardInterrupt ends the run early and keeps what was learned (``stopped``). A loss that is not finite
    raises SpectralAdapterError with the step; the parameters are then those of the step before.
    """
    optimiser = _optimiser(setup, config, method)
    peaks = [group["lr"] for group in optimiser.param_groups]
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(config.seed)
    result = TrainResult()
    started = time.perf_counter()
    try:
        for step in range(config.steps):
            _set_gates(setup.attachments, config, step)
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * config.rate_factor(step)
            loss = _step_loss(setup, config, generator)
            if not math.isfinite(loss.item()):
                raise SpectralAdapterError(
                    f"the loss became {loss.item()} at step {step + 1}: lower the learning rate "
                    f"(now {peaks[0]:g}); what was learned before this step is kept"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(parameters, config.gradient_clip or math.inf)
            optimiser.step()
            for attachment in setup.attachments:
                attachment.gates.end_step()
            result.losses.append(loss.item())
            if listener is not None:
                listener(
                    {
                        "step": step + 1,
                        "steps": config.steps,
                        "loss": loss.item(),
                        "learning_rate": optimiser.param_groups[0]["lr"],
                        "gradient_norm": float(norm),
                        "seconds": time.perf_counter() - started,
                    }
                )
    except KeyboardInterrupt:
        result.stopped = True
    result.seconds = time.perf_counter() - started
    return result


def _optimiser(setup: Setup, config: TrainConfig, method: str) -> torch.optim.Optimizer:
    """AdamW; no weight decay on gates (their biases must not drift towards a half-open gate) and token
    rows."""
    rate = config.rate_for(method)
    named = [item for attachment in setup.attachments for item in attachment.named_parameters()]
    gates = [p for name, p in named if ".gate." in name]
    rest = [p for name, p in named if ".gate." not in name]
    groups = [
        {"params": rest, "lr": rate, "weight_decay": config.weight_decay},
        {"params": gates, "lr": rate, "weight_decay": 0.0},
        {"params": list(setup.tokens), "lr": config.token_learning_rate or 10 * rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.99))


def _set_gates(attachments: Sequence[Attachment], config: TrainConfig, step: int) -> None:
    """Anneal; over the last tenth count E[p], from which the gates can be frozen without data."""
    for attachment in attachments:
        attachment.gates.anneal(step / config.steps)
        attachment.gates.target_open = config.target_open
        attachment.gates.penalty_weight = config.gate_penalty
        if step == int(0.9 * config.steps):
            attachment.gates.start_calibration()


def _step_loss(setup: Setup, config: TrainConfig, generator: torch.Generator) -> Tensor:
    indices = setup.order.next()
    timesteps = setup.diffusion.sample_timesteps(len(indices), generator)
    noise = torch.randn(len(indices), *setup.latents.shape[1:], generator=generator)
    dropped = torch.rand(len(indices), generator=generator) < config.caption_dropout
    captions = [None if drop else i for i, drop in zip(indices, dropped.tolist(), strict=True)]
    loss = denoising_loss(setup, indices, captions, timesteps, noise)
    return loss + sum(a.gates.penalty() for a in setup.attachments)


def denoising_loss(
    setup: Setup, indices: Sequence[int], captions: Sequence[int | None], timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of the prediction, for given timesteps (B,) and noise (B, C, H, W)."""
    latents = setup.latents[list(indices)]
    noise, timesteps = noise.to(latents), timesteps.to(latents.device)
    for attachment in setup.attachments:
        attachment.set_progress(setup.diffusion.progress(timesteps))
    noisy = setup.diffusion.add_noise(latents, noise, timesteps)
    prediction = setup.denoiser(noisy, timesteps, captions)
    target = setup.diffusion.target(latents, noise, timesteps)
    return (prediction.float() - target.float()).square().mean()


@torch.no_grad()
def evaluation_loss(setup: Setup, seed: int = 1234, levels: int = 8, batch_size: int = 16) -> float:
    """The loss over every picture at ``levels`` fixed noise levels with fixed noise: comparable before and
    after."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.linspace(0, setup.diffusion.timesteps - 1, levels + 2)[1:-1].long()
    cases = [(i, t) for i in range(len(setup.latents)) for t in steps]
    noise = torch.randn(len(cases), *setup.latents.shape[1:], generator=generator)
    total = 0.0
    for start in range(0, len(cases), batch_size):
        chunk = cases[start : start + batch_size]
        indices = [i for i, _ in chunk]
        timesteps = torch.stack([t for _, t in chunk])
        loss = denoising_loss(setup, indices, indices, timesteps, noise[start : start + len(chunk)])
        total += loss.item() * len(chunk)
    return total / len(cases)
