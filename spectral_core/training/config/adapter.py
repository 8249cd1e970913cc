"""Settings of every training besides the trainer's own: the adapter, the concept, what is kept and shown.

The dataclasses of what is to be trained (with pictures, as a slider, in the host) begin with these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import SpectralAdapterError
from ...methods import METHODS, MethodConfig, config_from_dict, with_setting
from .setting import check_settings, setting

Method = Literal["foura", "spectral_a", "spectral_r", "lora"]
Transform = Literal["dct", "dft", "none"]
Gate = Literal["adaptive", "none"]


def _offered(name: str) -> tuple[str, ...]:
    """The methods that read a setting, of those that are offered here."""
    return tuple(method for method in with_setting(name) if method in get_args(Method))


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What is trained: the method with its size, and the layers."""

    method: Method = setting(
        "foura",
        "What is trained. foura: low rank in frequency space with gates that adapt to the step. spectral_a: "
        "adds to the strongest singular columns. spectral_r: only rotates them, with very few numbers. lora: "
        "plain.",
        "adapter",
    )
    rank: int = setting(
        8,
        "How much the adapter can learn; the number of columns of spectral methods.",
        "adapter",
        least=1,
        metavar="R",
    )
    targets: str = setting(
        "attention",
        "Layers to train: attention, attention+mlp, all-linear, all, or name patterns. Patterns such as "
        "*attn2.to_k, separated by commas.",
        "adapter",
        metavar="NAMES",
    )
    columns: tuple[int, ...] = setting(
        (),
        "Singular columns, like 0-7; empty: the lowest that no other file of the model uses. Concepts in "
        "different columns fuse without overlap.",
        "adapter",
        methods=_offered("columns"),
        metavar="LIST",
    )
    train_scale: bool = setting(
        False,
        "The singular values are trained as well.",
        "adapter",
        methods=_offered("train_scale"),
        advanced=True,
    )
    alpha: float = setting(
        0.0,
        "Its scale is alpha / rank; 0 is a scale of 1.",
        "adapter",
        least=0,
        step=0.5,
        methods=_offered("alpha"),
        metavar="A",
        advanced=True,
    )
    transform: Transform = setting(
        "dct",
        "The frequency space that the low rank lives in.",
        "adapter",
        methods=_offered("transform"),
        advanced=True,
    )
    gate: Gate = setting(
        "adaptive", "Whether which rows act is learned.", "gate", methods=_offered("gate"), label="gate"
    )
    gate_budget: float = setting(
        0.0,
        "Share of gates that is open for every input, exactly; 0: as many as the input asks for. A layer's "
        "largest gates are. target_open then has no effect.",
        "gate",
        least=0,
        most=1,
        step=0.05,
        methods=_offered("gate_budget"),
        metavar="SHARE",
        advanced=True,
    )

    def check(self) -> None:
        """To be called first in ``__post_init__``."""
        check_settings(self)
        self.method_config(self.columns or tuple(range(self.rank)))

    @property
    def needs_columns(self) -> bool:
        return METHODS[self.method].needs_basis

    def method_config(self, columns: tuple[int, ...]) -> MethodConfig:
        """The method's configuration; ``columns`` are those it was given or found."""
        own = {
            "rank": self.rank,
            "alpha": self.alpha or None,
            "columns": columns,
            "train_scale": self.train_scale,
            "transform": self.transform,
            "gate": self.gate,
            "gate_budget": self.gate_budget if self.gate == "adaptive" else 0.0,
        }
        values = {name: value for name, value in own.items() if self.method in with_setting(name)}
        return config_from_dict({"method": self.method, **values})


@dataclass(frozen=True, kw_only=True)
class ConceptSettings(AdapterSettings):
    """How a concept is told by pictures, and what the model shall keep."""

    init_words: str = setting(
        "object",
        "Known words that the new word starts from; empty: it is not made a new word. It is then read as the "
        "CLIP reads it.",
        "text encoder",
        metavar="WORDS",
    )
    text_targets: str = setting(
        "",
        "Layers of the text encoders to train as well; empty: none. attention, attention+mlp or name "
        "patterns.",
        "text encoder",
        metavar="NAMES",
    )
    buckets: bool = setting(
        False,
        "Keep the pictures' proportions instead of cropping them.",
        "pictures",
        label="keep proportions",
    )
    validation_share: float = setting(
        0.0,
        "Share of the pictures that are held out of the training to judge it by; 0 holds out none. At least "
        "one is held out and one trained on.",
        "validation",
        least=0,
        most=1,
        ends="[)",
        step=0.05,
        metavar="SHARE",
    )
    validation_images: str = setting(
        "",
        "Folder with pictures to judge the training by, in place of a share. They show the concept and are "
        "captioned like the others. Needs vae and clip.",
        "validation",
        metavar="DIR",
    )
    class_words: str = setting(
        "",
        "What kind of thing the concept is, such as dog: it stays what it is; empty: init_words. Captions "
        "with it in place of the concept's word are then kept too.",
        "regularisation",
        metavar="WORDS",
    )
    preserve_prompts: str = setting(
        "",
        "Prompts under which the model stays as it is, separated by bars; empty: everyday ones. "
        "Without a word for the concept only those that are given here are kept.",
        "regularisation",
        metavar="PROMPTS",
        advanced=True,
    )
    prior_images: str = setting(
        "",
        "Folder with pictures of the concept's class, which the model keeps drawing. Dogs, for your dog. "
        "Uncaptioned ones are called 'a picture of' init_words. Needs vae and clip.",
        "regularisation",
        metavar="DIR",
    )

    def check_pictures(self) -> None:
        """SpectralAdapterError for held-out pictures that are named twice."""
        if self.validation_share and self.validation_images:
            raise SpectralAdapterError(
                f"validation_share {self.validation_share:g} and validation_images "
                f"{self.validation_images!r}: the held-out pictures are a share or a folder; set one of them"
            )


@dataclass(frozen=True, kw_only=True)
class KeptEvery:
    """How often a run is kept; the result does not depend on it."""

    checkpoint_every: int = setting(
        100,
        "Steps between checkpoints; one also comes at the end.",
        "run",
        least=0,
        metavar="N",
        advanced=True,
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings(KeptEvery):
    """How often a run is kept and shown; the result depends on neither."""

    sample_every: int = setting(
        0,
        "Steps between sample pictures; 0 is none. They stand beside the loss curve while it trains and are "
        "kept in the folder of the run.",
        "run",
        least=0,
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The pictures that the model draws itself to learn on."""

    samples: int = setting(
        16,
        "Pictures drawn of every concept to learn on, and of what is kept.",
        "samples",
        least=1,
        metavar="N",
    )
    sample_steps: int = setting(20, "Denoising steps of each of them.", "samples", least=1, metavar="N")
    guidance: float = setting(
        4.0,
        "Guidance (CFG) of these pictures. Take the one that you draw with; 1 for models without guidance.",
        "samples",
        least=0,
        step=0.1,
        metavar="G",
    )
    size: tuple[int, int] | None = setting(
        None,
        "Size of these pictures, like 512 or 768x512 (default: the model's own).",
        "samples",
        least=1,
        metavar="PIXELS",
    )
