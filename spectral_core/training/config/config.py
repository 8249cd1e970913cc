"""What a training run is told: frozen settings, checked where they are made. Only what the result depends on;
where checkpoints go and who listens is a :class:`..runs.place.Run`'s."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ...errors import SpectralAdapterError
from ...methods import METHODS, with_setting
from .schedules import ScheduleName, rate_factor
from .setting import check_settings, setting

Optimiser = Literal["adamw", "adafactor", "sgd", "schedulefree", "prodigy", "adamw8bit"]
Precision = Literal["fp32", "bf16", "fp16"]
Checkpointing = Literal["none", "selective", "full"]
Timesteps = Literal["uniform", "logit-normal"]
Weighting = Literal["none", "min-snr"]

_GATED = with_setting("gate")

GATE_TRAVEL = 12.0
"""Learning rate times steps of the gates. Adam moves a logit by about its rate a step, and a gate starts at
logit 2: what decides is how far it can go in the run, not the adapter's rate
(``benchmarks.quality.gates``)."""

MOST_GATE_RATE = 0.3  # a step; the default of runs below 40 steps

PRODIGY_RATE = 1.0  # prodigy finds the rate itself; this multiplies what it finds


@dataclass(frozen=True)
class TrainConfig:
    """The settings of the trainer itself; each says below what it means, and its range.

    Raises SpectralAdapterError for values out of range and for those that do not fit together.

    >>> TrainConfig(steps=300, batch_size=2).accumulation
    1
    """

    steps: int = setting(500, "How many times the adapter is improved.", "run", least=1, metavar="N")
    batch_size: int = setting(
        1,
        "Pictures per step (and process). More is smoother and needs memory.",
        "memory",
        least=1,
        metavar="N",
    )
    accumulation: int = setting(
        1,
        "Batches per step: a larger batch without the memory.",
        "memory",
        least=1,
        metavar="N",
        advanced=True,
    )
    learning_rate: float = setting(
        0.0,
        "How large each improvement is; 0 takes the method's default. Spectral_r needs about a hundred times "
        "lora's.",
        "optimiser",
        least=0,
        step=1e-6,
        metavar="RATE",
    )
    text_learning_rate: float = setting(
        0.0,
        "Learning rate of the text encoders; 0 is half of the other.",
        "text encoder",
        least=0,
        step=1e-6,
        metavar="RATE",
    )
    token_learning_rate: float = setting(
        0.0,
        "Learning rate of the new word; 0 is ten times the adapter's.",
        "text encoder",
        least=0,
        step=1e-6,
        metavar="RATE",
        advanced=True,
    )
    optimiser: Optimiser = setting(
        "adamw",
        "How improvements are computed. schedulefree, prodigy and adamw8bit need their Python packages.",
        "optimiser",
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.99),
        "Decay of the optimiser's averages; sgd takes the first as momentum.",
        "optimiser",
        least=0,
        most=1,
        ends="[)",
        metavar="B1,B2",
        advanced=True,
    )
    weight_decay: float = setting(
        0.01,
        "How strongly parameters are drawn to 0; gates and words are not.",
        "optimiser",
        least=0,
        step=0.001,
        metavar="W",
        advanced=True,
    )
    warmup: int = setting(
        10, "Steps over which the learning rate rises at the start.", "optimiser", least=0, metavar="N"
    )
    schedule: ScheduleName = setting(
        "constant", "The learning rate over the run: level, or falling to zero.", "optimiser"
    )
    gradient_clip: float = setting(
        1.0,
        "Largest norm of the gradients; 0 is no limit.",
        "optimiser",
        least=0,
        step=0.1,
        metavar="NORM",
        advanced=True,
    )
    ema: float = setting(
        0.0,
        "Decay of an average of the steps, which the result then holds; 0 is off.",
        "optimiser",
        least=0,
        most=1,
        ends="[)",
        step=0.0001,
        metavar="DECAY",
        advanced=True,
    )
    precision: Precision = setting(
        "fp32",
        "What the model computes in; the adapter itself is always fp32.",
        "memory",
    )
    checkpointing: Checkpointing = setting(
        "none",
        "Compute activations again instead of keeping them. Less memory for more time; the result is the "
        "same.",
        "memory",
        label="gradient checkpointing",
    )
    caption_dropout: float = setting(
        0.1,
        "Share of pictures shown without their caption. Guidance needs some.",
        "regularisation",
        least=0,
        most=1,
        ends="[)",
        step=0.01,
        metavar="SHARE",
    )
    timesteps: Timesteps = setting(
        "uniform", "Which noise levels are trained: all alike, or the middle ones more.", "noise"
    )
    timestep_mean: float = setting(
        0.0,
        "Middle of logit-normal; above 0 noisier levels count more.",
        "noise",
        least=-100,
        most=100,
        step=0.1,
        metavar="X",
        advanced=True,
    )
    timestep_std: float = setting(
        1.0,
        "Width of logit-normal.",
        "noise",
        least=0,
        step=0.1,
        metavar="X",
        advanced=True,
    )
    weighting: Weighting = setting(
        "none",
        "How noise levels count: all alike, or nearly clean ones less (min-snr). Not for flow models.",
        "noise",
    )
    snr_gamma: float = setting(
        5.0,
        "Limit of min-snr; lower counts them less.",
        "noise",
        least=0,
        step=0.1,
        metavar="X",
        advanced=True,
    )
    prior_weight: float = setting(
        1.0,
        "How much the prior pictures count beside the concept's.",
        "regularisation",
        least=0,
        step=0.05,
        metavar="W",
    )
    preserve_every: int = setting(
        4,
        "Steps between those that also keep what the model draws without the concept; 0 is never. It learns "
        "its own predictions under everyday prompts, without pictures. Every fourth step costs a third more.",
        "regularisation",
        least=0,
        metavar="N",
    )
    preserve_weight: float = setting(
        1.0,
        "How much that counts beside the concept.",
        "regularisation",
        least=0,
        step=0.05,
        metavar="W",
        advanced=True,
    )
    gate_learning_rate: float = setting(
        0.0,
        "Learning rate of the gates; 0 is 12 / steps. It does not depend on the adapter's.",
        "gate",
        least=0,
        step=1e-3,
        methods=_GATED,
        metavar="RATE",
    )
    target_open: float = setting(
        0.5,
        "Share of gates that shall be open at the end; 0: no target. Without one most stay open.",
        "gate",
        least=0,
        most=1,
        step=0.05,
        methods=_GATED,
        metavar="SHARE",
    )
    gate_penalty: float = setting(
        0.1,
        "Weight of that target in the loss.",
        "gate",
        least=0,
        step=0.01,
        methods=_GATED,
        metavar="W",
        advanced=True,
    )
    freeze_gates: bool = setting(
        False, "Fix the gates at the end, so that the adapter merges exactly.", "gate", methods=_GATED
    )
    frozen_share: float = setting(
        0.2,
        "With freeze_gates, the share of the steps that train on with the fixed gates. Fixing them without "
        "that loses what they had gained.",
        "gate",
        least=0,
        most=1,
        ends="[)",
        step=0.05,
        methods=_GATED,
        metavar="SHARE",
    )
    compare_ungated: bool = setting(
        False,
        "Train one without gates and of the same effective rank afterwards, to compare losses. Twice the "
        "time; the result is the same.",
        "gate",
        methods=_GATED,
        advanced=True,
    )
    validation_every: int = setting(
        50,
        "Steps between checks of the loss on the pictures that are held out.",
        "validation",
        least=1,
        metavar="N",
    )
    patience: int = setting(
        0,
        "Stop after so many checks without improvement, and take the best; 0 never stops. The best is then "
        "kept beside the last.",
        "validation",
        least=0,
        metavar="N",
    )
    explosion: float = setting(
        5.0,
        "Stop where the smoothed loss is this many times its first level; 0 never.",
        "noise",
        least=0,
        step=0.5,
        metavar="X",
        advanced=True,
    )
    processes: int = setting(
        0,
        "Refuse to train with any other number of processes; 0 is as started.",
        "memory",
        least=0,
        metavar="N",
        command_only=True,
    )
    seed: int = setting(
        0,
        "The same seed and settings give the same adapter. It never changes by itself.",
        "optimiser",
        metavar="N",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.optimiser == "schedulefree" and self.schedule != "constant":
            raise SpectralAdapterError(
                f"schedule {self.schedule!r} with optimiser 'schedulefree': expected 'constant'; this "
                "optimiser replaces the schedule (warm-up is kept)"
            )
        if self.optimiser == "schedulefree" and self.ema:
            raise SpectralAdapterError("ema with optimiser 'schedulefree': it averages already; set ema to 0")
        if self.patience and self.freeze_gates:
            raise SpectralAdapterError(
                "patience with freeze_gates: gates are fixed over the last of the planned steps, which a run "
                "that stops early does not reach; set one of them to 0"
            )
        if self.optimiser == "sgd" and self.learning_rate == 0:
            raise SpectralAdapterError(
                "learning_rate 0 with optimiser 'sgd': the methods' defaults are AdamW's; give a rate"
            )

    def rate_for(self, method: str) -> float:
        """The adapter's peak learning rate."""
        if self.optimiser == "prodigy":
            return self.learning_rate or PRODIGY_RATE
        return self.learning_rate or METHODS[method].config.learning_rate

    def gate_rate(self, start: int = 0) -> float:
        """The gates' peak learning rate in a schedule that began at step ``start``."""
        return self.gate_learning_rate or min(GATE_TRAVEL / max(1, self.steps - start), MOST_GATE_RATE)

    def gate_rate_factor(self, step: int, start: int = 0) -> float:
        """Multiplier of that, whatever the adapter's schedule: half a cosine after the warm-up, so that gates
        come to rest."""
        return rate_factor("cosine", step - start, self.steps - start, self.warmup)

    def rate_factor(self, step: int, start: int = 0) -> float:
        """Multiplier of the peak rate at a step (from 0) of a schedule that began at step ``start``."""
        return rate_factor(self.schedule, step - start, self.steps - start, self.warmup)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"betas": list(self.betas)}
