"""What a training run is told: frozen settings, checked where they are made. Only what the result depends on;
where checkpoints go and who listens is a :class:`..runs.place.Run`'s."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import SpectralAdapterError
from .schedules import SCHEDULES, rate_factor

OPTIMISERS = ("adamw", "adafactor", "sgd", "schedulefree", "prodigy")
PRECISIONS = ("fp32", "bf16", "fp16")
CHECKPOINTING = ("none", "selective", "full")
TIMESTEPS = ("uniform", "logit-normal")
WEIGHTINGS = ("none", "min-snr")

DEFAULT_LEARNING_RATES = {
    "foura": 1e-4,
    "lora": 1e-4,
    "orthogonal": 1e-4,
    "spectral_a": 1e-3,
    "spectral_r": 1e-2,
}
"""Starting points for models of Stable Diffusion's size; 0 in TrainConfig.learning_rate chooses from here."""

PRODIGY_RATE = 1.0  # prodigy finds the rate itself; this multiplies what it finds

_CHOICES = {
    "schedule": SCHEDULES,
    "optimiser": OPTIMISERS,
    "precision": PRECISIONS,
    "checkpointing": CHECKPOINTING,
    "timesteps": TIMESTEPS,
    "weighting": WEIGHTINGS,
}
_WHOLE = {"steps": 1, "batch_size": 1, "accumulation": 1, "warmup": 0, "processes": 0}
_NUMBERS = (
    "learning_rate",
    "text_learning_rate",
    "token_learning_rate",
    "weight_decay",
    "gradient_clip",
    "gate_penalty",
    "timestep_std",
    "snr_gamma",
    "prior_weight",
    "explosion",
)


@dataclass(frozen=True)
class TrainConfig:
    """steps and batch_size count optimiser steps and pictures; learning_rate 0 is the method's default.

    accumulation: batches per optimiser step. text_learning_rate: of text encoders; 0 is half the adapter's.
    token_learning_rate: of new word embeddings; 0 is ten times the adapter's. gradient_clip 0: none. ema:
    decay of the averaged parameters that the result then holds, 0 for none. precision: of the model's
    computations; what is trained stays float32. checkpointing: activations computed again in backward
    instead of kept. caption_dropout: share of pictures that train with an empty caption. timesteps,
    timestep_mean, timestep_std: distribution of noise levels. weighting, snr_gamma: of the loss per noise
    level. prior_weight: of the prior examples' loss. target_open: wanted share of open gates (None: no
    penalty), gate_penalty its weight. freeze_gates: the result has its gates frozen. explosion: the run stops
    where the smoothed loss exceeds this many times its first level; 0 never. processes: how many must take
    part, 0 for as many as there are; batch_size is each one's.
    """

    steps: int = 500
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 0.0
    text_learning_rate: float = 0.0
    token_learning_rate: float = 0.0
    optimiser: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 10
    schedule: str = "constant"
    gradient_clip: float = 1.0
    ema: float = 0.0
    precision: str = "fp32"
    checkpointing: str = "none"
    caption_dropout: float = 0.1
    timesteps: str = "uniform"
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    weighting: str = "none"
    snr_gamma: float = 5.0
    prior_weight: float = 1.0
    target_open: float | None = None
    gate_penalty: float = 0.1
    freeze_gates: bool = False
    explosion: float = 5.0
    processes: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, least in _WHOLE.items():
            self._whole(name, least)
        for name in _NUMBERS:
            self._at_least(name, 0.0)
        if not -100 <= self._number("timestep_mean") <= 100:
            raise SpectralAdapterError(f"timestep_mean {self.timestep_mean}: expected −100 … 100")
        for name in ("caption_dropout", "ema"):
            if not 0 <= self._number(name) < 1:
                raise SpectralAdapterError(f"{name} {getattr(self, name)}: expected 0 ≤ share < 1")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise SpectralAdapterError(f"betas {self.betas}: expected two numbers, 0 ≤ beta < 1")
        if self.target_open is not None and not 0 < self.target_open <= 1:
            raise SpectralAdapterError(f"target_open {self.target_open}: expected 0 < share ≤ 1, or nothing")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise SpectralAdapterError(
                    f"{name} {getattr(self, name)!r}: expected one of {', '.join(choices)}"
                )
        self._check_together()

    def _check_together(self) -> None:
        if self.optimiser == "schedulefree" and self.schedule != "constant":
            raise SpectralAdapterError(
                f"schedule {self.schedule!r} with optimiser 'schedulefree': expected 'constant'; this "
                "optimiser replaces the schedule (warm-up is kept)"
            )
        if self.optimiser == "schedulefree" and self.ema:
            raise SpectralAdapterError("ema with optimiser 'schedulefree': it averages already; set ema to 0")
        if self.optimiser == "sgd" and self.learning_rate == 0:
            raise SpectralAdapterError(
                "learning_rate 0 with optimiser 'sgd': the methods' defaults are AdamW's; give a rate"
            )

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise SpectralAdapterError(f"{name} {value!r}: expected a number")
        return float(value)

    def _at_least(self, name: str, least: float) -> None:
        if self._number(name) < least:
            raise SpectralAdapterError(
                f"{name} {getattr(self, name)}: expected a number of at least {least:g}"
            )

    def _whole(self, name: str, least: int) -> None:
        self._at_least(name, least)
        if not isinstance(getattr(self, name), int):
            raise SpectralAdapterError(f"{name} {getattr(self, name)!r}: expected a whole number")

    def rate_for(self, method: str) -> float:
        """The adapter's peak learning rate."""
        if self.optimiser == "prodigy":
            return self.learning_rate or PRODIGY_RATE
        return self.learning_rate or DEFAULT_LEARNING_RATES[method]

    def rate_factor(self, step: int, start: int = 0) -> float:
        """Multiplier of the peak rate at a step (from 0) of a schedule that began at step ``start``."""
        return rate_factor(self.schedule, step - start, self.steps - start, self.warmup)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`as_dict`; unknown names are refused."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(known)}"
                raise SpectralAdapterError(f"unknown training setting {name!r}: {hint}")
        return cls(**values)
