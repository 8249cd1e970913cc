"""What a setting that is left to the program becomes on one model: learning rate and size of the pictures."""

from __future__ import annotations

from ...methods import METHODS
from .config import TrainConfig

NARROW = 256  # channels of the first level; Stable Diffusion 1 to XL have 320
NARROW_RATE = 3e-3
"""At 64 and 128 channels every method is best near this rate (docs/training.md has the sweep)."""

_FEW_STEPS = 5
_FAR = 2.0  # times the model's own size, either way


def usual_rate(method: str, channels: int) -> float:
    """The learning rate to begin with; channels: of the model's first level, 0 where that is unknown."""
    return NARROW_RATE if 0 < channels < NARROW else METHODS[method].config.learning_rate


def rate_note(config: TrainConfig, method: str, channels: int) -> str:
    """What to say of a rate that cannot move anything in the steps asked for; empty where it can.

    Adam moves a parameter by at most about the rate in each step, so rate × steps bounds the way.
    """
    usual, rate = usual_rate(method, channels), config.rate_for(method)
    if config.optimiser in ("prodigy", "sgd") or rate * config.steps >= _FEW_STEPS * usual:
        return ""
    if config.steps <= _FEW_STEPS and rate >= usual:
        return f"{config.steps} steps are too few to learn anything: expected some hundred"
    return (
        f"learning_rate {rate:g} over {config.steps} steps moves next to nothing on this model: expected "
        f"about {usual:g} for {method} (0 takes that), or more steps"
    )


def size_note(resolution: int, usual: int) -> str:
    """What to say of pictures whose size is far from the model's own; empty where it is near."""
    if usual / _FAR < resolution < usual * _FAR:
        return ""
    return f"resolution {resolution}: the model's own is {usual} (0 takes that); it learns badly at others"
