"""The adaptive rank gate: its formula, its state while a model runs, and the record of what it did."""

from .record import GateRecorder
from .runtime import GateRuntime

__all__ = [
    "GateRecorder",
    "GateRuntime",
]
