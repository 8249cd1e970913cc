"""What the node Train Adapter was asked to do, checked; and the settings by which its run is known.

Shapes: none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.methods import MethodConfig, config_from_dict
from ....spectral_core.training.config.config import TrainConfig
from ..files import names

METHODS = ("foura", "spectral_a", "spectral_r", "lora")
MOST_COLUMNS = 4096
_COLUMNS = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


def parse_columns(text: str) -> tuple[int, ...]:
    """``0-7, 12`` as indices; nothing for empty text."""
    found: list[int] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _COLUMNS.fullmatch(item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 0 <= last - first < MOST_COLUMNS:
            raise SpectralAdapterError(f"columns {text!r}: expected numbers and ranges, such as 0-7, 12")
        found += range(first, last + 1)
    return tuple(found)


@dataclass(frozen=True)
class Job:
    """run_name, method and layers; where the pictures come from; how often to save and to draw a sample.

    init_words: known words from which the trigger word starts as a new word of its own; empty: it stays as
    the CLIP reads it. text_targets: layers of the text encoders, empty for none. prior_images: a folder of
    pictures of the concept's class, which the model shall go on drawing. ``continued`` is an adapter
    whose method, rank, columns and layers are taken over; its words and text layers stay as they are.
    """

    run_name: str
    config: TrainConfig
    method: str = "foura"
    rank: int = 8
    columns: tuple[int, ...] = ()
    train_scale: bool = False
    transform: str = "dct"
    gate: str = "adaptive"
    targets: str = "attention"
    images: str = ""
    trigger_word: str = ""
    init_words: str = ""
    text_targets: str = ""
    resolution: int = 512
    keep_proportions: bool = False
    precision: str = "auto"
    checkpoint_every: int = 100
    sample_every: int = 0
    sample_prompt: str = ""
    prior_images: str = ""
    continued: Adapter | None = None

    def __post_init__(self) -> None:
        if len(names.safe_parts(self.run_name, "run_name")) != 1 or self.run_name.strip().startswith("."):
            raise SpectralAdapterError(f"run_name {self.run_name!r}: expected a plain name without slashes")
        object.__setattr__(self, "run_name", self.run_name.strip())
        if self.continued is not None:
            object.__setattr__(self, "method", _only_method(self.continued))
        elif self.method not in METHODS:
            raise SpectralAdapterError(f"method {self.method!r}: expected one of {', '.join(METHODS)}")
        elif self.rank < 1:
            raise SpectralAdapterError(f"rank {self.rank}: expected a whole number of at least 1")
        for name in ("checkpoint_every", "sample_every"):
            if getattr(self, name) < 0:
                raise SpectralAdapterError(f"{name} {getattr(self, name)}: expected at least 0")
        self._check_text()
        self.method_config(self.columns or tuple(range(self.rank)))

    def _check_text(self) -> None:
        word = self.trigger_word.strip()
        if not self.trains_text:
            return
        if not self.images:
            raise SpectralAdapterError(
                "text_targets or init_words: captions of a folder are needed, connected conditioning is "
                "encoded already; choose a folder as images, or leave both empty"
            )
        if self.continued is not None:
            raise SpectralAdapterError(
                "text_targets or init_words: a connected adapter goes on with the layers of the model only; "
                "leave both empty, or disconnect the adapter"
            )
        if self.init_words.strip() and (not word or any(c.isspace() for c in word)):
            raise SpectralAdapterError(
                f"trigger_word {self.trigger_word!r}: init_words make it a new word, so one without spaces "
                "is expected, such as <mydog>"
            )

    @property
    def trains_text(self) -> bool:
        """Whether the CLIP learns: its layers, or a new word."""
        return bool(self.text_targets.strip() or self.init_words.strip())

    @property
    def needs_vae(self) -> bool:
        """Whether pictures are encoded."""
        return bool(self.images or self.prior_images)

    @property
    def needs_columns(self) -> bool:
        return self.method.startswith("spectral")

    def method_config(self, columns: tuple[int, ...]) -> MethodConfig:
        """The method's configuration with the columns that were given or found."""
        if self.needs_columns:
            values: dict[str, Any] = {"columns": columns, "train_scale": self.train_scale}
        else:
            values = {"rank": self.rank}
            if self.method == "foura":
                values |= {"transform": self.transform, "gate": self.gate}
        return config_from_dict({"method": self.method, **values})

    def settings(self) -> dict[str, Any]:
        """What the result depends on, JSON-able; the pictures and the models count by content, elsewhere."""
        apart: tuple[str, ...] = ("run_name", "config", "checkpoint_every", "images", "continued")
        apart += ("sample_every", "sample_prompt", "prior_images")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        for name in ("init_words", "text_targets"):
            values[name] = values[name].strip()
            if not values[name]:  # which runs of earlier versions did not have
                del values[name]
        if not self.images:
            del values["trigger_word"]
        if not self.needs_vae:
            del values["resolution"], values["keep_proportions"]
        if self.continued is not None:
            for name in ("rank", "columns", "train_scale", "transform", "gate", "targets"):
                del values[name]
            values["continued"] = self.continued.content_hash
        return {**values, "columns": list(self.columns)} if "columns" in values else values


def _only_method(adapter: Adapter) -> str:
    if len(adapter.methods) != 1:
        raise SpectralAdapterError(
            f"adapter {adapter.provenance.name or '(unnamed)'}: has the methods "
            f"{', '.join(adapter.methods) or '(none)'}; only an adapter of one method can be trained on"
        )
    return adapter.methods[0]
