"""What to train on a diffusers pipeline: the pictures, the layers and the method, as one frozen description.

Shapes: sizes are (width, height) in pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import SpectralAdapterError
from ..training.config.adapter import ConceptSettings
from ..training.config.setting import setting


@dataclass(frozen=True)
class Job(ConceptSettings):
    """images: a folder in kohya layout. token: the concept's word; sample_prompts: what the samples show.

    The method, the layers and what else can be set: :mod:`..training.config.adapter`. Raises
    SpectralAdapterError for what cannot be.
    """

    images: str
    token: str
    size: tuple[int, int] = setting(
        (512, 512), "Size of the pictures in pixels, like 512 or 768x512.", "pictures", metavar="PIXELS"
    )
    cache: bool = setting(True, "Keep latents and captions on disk.", "pictures", command_only=True)
    sample_prompts: tuple[str, ...] = setting(
        (), "What the samples show; may be given several times.", "run", metavar="PROMPT"
    )

    def __post_init__(self) -> None:
        self.check()
        if not self.token.strip() or any(c.isspace() for c in self.token):
            raise SpectralAdapterError(
                f"token {self.token!r}: expected one word without spaces, such as <mydog>"
            )
        self.check_pictures()
        if len(self.size) != 2 or not all(isinstance(s, int) and s > 0 for s in self.size):
            raise SpectralAdapterError(f"size {self.size}: expected width and height in pixels")

    def settings(self) -> dict[str, Any]:
        """What the result depends on, JSON-able; the pictures count by content and not by path."""
        values = asdict(self)
        for name in ("images", "prior_images", "validation_images", "cache", "sample_prompts"):
            del values[name]
        if not self.gate_budget:  # which runs of earlier versions did not have
            del values["gate_budget"]
        return values | {"columns": list(self.columns), "size": list(self.size)}

    @property
    def folder(self) -> Path:
        return Path(self.images)
