"""What the node Train Adapter was asked to do, checked; and the settings by which its run is known."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.training.config.adapter import ConceptSettings, RunSettings
from ....spectral_core.training.config.config import TrainConfig
from ....spectral_core.training.config.setting import like, setting
from ..files import names

NodePrecision = Literal["auto", "fp32", "bf16", "fp16"]
Offload = Literal["auto", "none", "half", "all"]


@dataclass(frozen=True, kw_only=True)
class Job(ConceptSettings, RunSettings):
    """run_name, the trainer's settings, where the pictures come from; the rest below and in
    :mod:`....spectral_core.training.config.adapter`.

    ``continued`` is an adapter whose method, rank, columns and layers are taken over; its words and text
    layers stay as they are. resolution 0: the model's own (:mod:`.defaults`).
    """

    run_name: str
    config: TrainConfig
    images: str = ""
    trigger_word: str = ""
    init_words: str = like(ConceptSettings, "init_words", "")
    resolution: int = setting(
        0,
        "Size in pixels of the pictures of a folder; 0 is the model's own.",
        "pictures",
        least=0,
        most=4096,
        step=8,
    )
    precision: NodePrecision = setting(
        "auto",
        "What the model computes in; auto leaves it as it is. The adapter itself is always fp32.",
        "memory",
    )
    offload: Offload = setting(
        "auto",
        "How much of the model stays off the device and is streamed in layer by layer: slower, the result is "
        "the same. auto: what does not fit beside a step.",
        "memory",
    )
    sample_prompt: str = setting(
        "", "What the samples show. Empty: the first caption. Needs clip.", "validation"
    )
    continued: Adapter | None = None

    def __post_init__(self) -> None:
        if len(names.safe_parts(self.run_name, "run_name")) != 1 or self.run_name.strip().startswith("."):
            raise SpectralAdapterError(f"run_name {self.run_name!r}: expected a plain name without slashes")
        object.__setattr__(self, "run_name", self.run_name.strip())
        if self.continued is not None:
            object.__setattr__(self, "method", _only_method(self.continued))
        self._check_text()
        self.check_pictures()
        if self.continued is None:
            self.check()

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
        return bool(self.images or self.prior_images or self.validation_images)

    def settings(self) -> dict[str, Any]:
        """What the result depends on, JSON-able; the pictures and the models count by content, elsewhere."""
        apart: tuple[str, ...] = ("run_name", "config", "checkpoint_every", "images", "continued")
        apart += ("sample_every", "sample_prompt", "prior_images", "validation_images", "buckets", "alpha")
        apart += ("gate_budget", "offload")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        for name in ("init_words", "text_targets", "class_words", "preserve_prompts"):
            values[name] = values[name].strip()
            if not values[name]:  # which runs of earlier versions did not have
                del values[name]
        if not self.validation_share:
            del values["validation_share"]
        for name in ("alpha", "gate_budget"):
            if found := getattr(self, name):
                values[name] = found
        if not self.images:
            del values["trigger_word"]
        if self.needs_vae:
            values["keep_proportions"] = self.buckets
        else:
            del values["resolution"]
        if self.continued is not None:
            of_adapter = ("rank", "columns", "train_scale", "transform", "gate", "gate_budget", "alpha")
            for name in (*of_adapter, "targets"):
                values.pop(name, None)
            values["continued"] = self.continued.content_hash
        return {**values, "columns": list(self.columns)} if "columns" in values else values


def _only_method(adapter: Adapter) -> str:
    if len(adapter.methods) != 1:
        raise SpectralAdapterError(
            f"adapter {adapter.provenance.name or '(unnamed)'}: has the methods "
            f"{', '.join(adapter.methods) or '(none)'}; only an adapter of one method can be trained on"
        )
    return adapter.methods[0]
