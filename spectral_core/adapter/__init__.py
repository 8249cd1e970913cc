"""The adapter as an immutable value, its strengths and schedule, and which base model it belongs to."""

from .adapter import Adapter, AdapterLayer, Provenance, Term, create
from .schedule import Schedule

__all__ = [
    "Adapter",
    "AdapterLayer",
    "Provenance",
    "Schedule",
    "Term",
    "create",
]
