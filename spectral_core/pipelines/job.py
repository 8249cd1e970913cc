"""What to train on a diffusers pipeline: the pictures, the layers and the method, as one frozen description.

Shapes: sizes are (width, height) in pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import SpectralAdapterError
from ..methods import MethodConfig, config_from_dict

METHODS = ("foura", "spectral_a", "spectral_r", "lora")


@dataclass(frozen=True)
class Job:
    """images: a folder in kohya layout. token: the concept's word; init_words: known words that it starts
    from (empty: the token is not made a new word).

    method, rank: with transform and gate for FouRA, with columns and train_scale for the spectral methods
    (columns empty: the lowest that no file of this base uses), alpha for FouRA and LoRA (0: the rank).
    targets: layers of the denoiser; text_targets: of the text encoders, empty for none. size: of the
    pictures; buckets: pictures keep their proportions, at sizes of that area. prior_images: pictures of the
    concept's class, which the model should keep drawing as it does. cache: latents and text embeddings are
    kept on disk. sample_prompts: what the samples show.
    """

    images: str
    token: str
    init_words: str = "object"
    method: str = "foura"
    rank: int = 8
    alpha: float = 0.0
    transform: str = "dct"
    gate: str = "adaptive"
    columns: tuple[int, ...] = ()
    train_scale: bool = False
    targets: str = "attention"
    text_targets: str = ""
    size: tuple[int, int] = (512, 512)
    buckets: bool = False
    prior_images: str = ""
    cache: bool = True
    sample_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("columns", "size", "sample_prompts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.token.strip() or any(c.isspace() for c in self.token):
            raise SpectralAdapterError(
                f"token {self.token!r}: expected one word without spaces, such as <mydog>"
            )
        if self.method not in METHODS:
            raise SpectralAdapterError(f"method {self.method!r}: expected one of {', '.join(METHODS)}")
        if len(self.size) != 2 or not all(isinstance(s, int) and s > 0 for s in self.size):
            raise SpectralAdapterError(f"size {self.size}: expected width and height in pixels")
        self.method_config(self.columns or tuple(range(max(self.rank, 1))))

    @property
    def needs_columns(self) -> bool:
        return self.method.startswith("spectral")

    def method_config(self, columns: tuple[int, ...]) -> MethodConfig:
        """The method's configuration; ``columns`` are those it was given or found."""
        if self.needs_columns:
            values: dict[str, Any] = {"columns": columns, "train_scale": self.train_scale}
            if self.rank < 1:
                raise SpectralAdapterError(f"rank {self.rank}: expected a whole number of at least 1")
        else:
            values = {"rank": self.rank, "alpha": self.alpha or None}
            if self.method == "foura":
                values |= {"transform": self.transform, "gate": self.gate}
        return config_from_dict({"method": self.method, **values})

    def settings(self) -> dict[str, Any]:
        """What the result depends on, JSON-able; the pictures count by content and not by path."""
        values = asdict(self)
        for name in ("images", "prior_images", "cache", "sample_prompts"):
            del values[name]
        return values | {"columns": list(self.columns), "size": list(self.size)}

    @property
    def folder(self) -> Path:
        return Path(self.images)
