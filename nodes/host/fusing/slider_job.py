"""What the node Concept Slider was asked to do, checked.

Shapes: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.training.config.config import TrainConfig
from ....spectral_core.training.objectives.slider import SliderSettings, examples
from ..files import names


@dataclass(frozen=True, kw_only=True)
class Job(SliderSettings):
    """run_name, the trainer's settings, precision. Its words are the node's; see :class:`SliderSettings`."""

    run_name: str
    config: TrainConfig
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    checkpoint_every: int = 100

    continued = None  # a slider begins anew, with no word and no layers of the text encoder
    trigger_word = ""
    text_targets = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(names.safe_parts(self.run_name, "run_name")) != 1 or self.run_name.strip().startswith("."):
            raise SpectralAdapterError(f"run_name {self.run_name!r}: expected a plain name without slashes")

    @property
    def texts(self) -> tuple[str, ...]:
        """Every prompt that the model is told, each once."""
        shown = examples(self.neutral, self.positive, self.negative, self.preserve, self.samples)
        return tuple(dict.fromkeys(t for e in shown for t in (e.neutral, e.positive, e.negative)))
