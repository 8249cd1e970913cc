"""A named run: its folder, checkpoints, events and result."""

from .outcome import GateReport, TrainResult
from .place import Place, Run

__all__ = [
    "GateReport",
    "Place",
    "Run",
    "TrainResult",
]
