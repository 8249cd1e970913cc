"""Training: a loop over a callable model, its configuration and its data. Nothing here knows a pipeline or
a host."""

from .config.config import TrainConfig
from .engine.loop import train
from .objectives.losses import Setup
from .runs.outcome import GateReport, TrainResult
from .runs.place import Run

__all__ = [
    "GateReport",
    "Run",
    "Setup",
    "TrainConfig",
    "TrainResult",
    "train",
]
