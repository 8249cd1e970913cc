"""Distillation (Hinton et al., arXiv 1503.02531) of several adapters into one: after a fusion, the one
adapter learns to predict what each concept's own adapter predicts for that concept, and what the model alone
does for everything else.

    ε(x_t, prompt of concept i; fused)  =  ε(x_t, prompt of concept i; adapter i)
    ε(x_t, another prompt; fused)       =  ε(x_t, another prompt)

A fusion layer by layer cannot do this: most layers see nearly the same input whichever concept is drawn, so
that no fixed update is right for all of them there, and only the model as a whole can make up for it. x_t are
noised samples that the concept's own adapter has drawn: no pictures are needed. Prediction means the model's
own kind, so ε-, v- and flow models are alike.

Shapes: noisy (B, C, H, W), timesteps (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...adapter.adapter import Adapter, AdapterLayer
from ...attach.attaching import Attachment
from ...errors import SpectralAdapterError
from ...fusion.linear import plain_term
from ...maths.lowrank import concatenate, recompress
from ..config.config import TrainConfig
from .diffusion import NoiseProcess

DISTIL = TrainConfig(steps=200, batch_size=4, schedule="cosine")
"""The training settings to begin with."""
BASE = -1  # in place of a concept: the model alone
RATE = 0.02  # of the parameters' root mean square; docs/evidence/fusing.md says how it was chosen

Predict = Callable[[Tensor, Tensor, Sequence[int], bool], Tensor]
"""The model: (noisy, timesteps, an example for each row, whether its text is the teacher's) -> prediction."""


@dataclass(frozen=True)
class DistilExample:
    """A sample of one concept (its number, or BASE) and what is said of it; ``repeats`` of an epoch."""

    concept: int
    prompt: str
    repeats: int = 1


def examples(
    prompts: Sequence[Sequence[str]], preserve: Sequence[str], samples: int, dropout: float
) -> tuple[list[DistilExample], list[int]]:
    """The examples, and for each the number of its sample.

    prompts: of every concept; ``samples`` of each are shown, its prompts in turn, and as many of
    ``preserve``. dropout: share of the examples that say nothing, for the guidance's empty prompt. Samples
    are numbered concept after concept, those of the model alone last.
    """
    if not 0 <= dropout < 1:
        raise SpectralAdapterError(f"caption_dropout {dropout}: expected 0 ≤ share < 1")
    said = max(1, round((1 - dropout) / dropout)) if dropout else 1
    found: list[DistilExample] = []
    places: list[int] = []
    number = 0
    groups = [*enumerate(prompts), (BASE, preserve)]
    for concept, texts in groups:
        for k in range(samples if texts else 0):
            found.append(DistilExample(concept, texts[k % len(texts)], said))
            places.append(number)
            if dropout:
                found.append(DistilExample(concept, ""))
                places.append(number)
            number += 1
    return found, places


def drawn_as(shown: Sequence[DistilExample], places: Sequence[int]) -> dict[int, DistilExample]:
    """Sample number -> the example that it is drawn as, which is the one with its prompt."""
    found: dict[int, DistilExample] = {}
    for example, number in zip(shown, places, strict=True):
        found.setdefault(number, example)
    return found


def student_of(fused: Adapter) -> Adapter:
    """The adapter as plain LoRA with everything folded in, down and up of equal size, so that both learn.

    Raises SpectralAdapterError for a live gate, which has no fixed update.
    """
    layers = {}
    for name, layer in fused.layers.items():
        if not all(term.mergeable for term in layer.terms):
            raise SpectralAdapterError(
                f"layer {name} has an adaptive gate, and only fixed updates are distilled: fuse with "
                "closed-form, or freeze the gates"
            )
        factors = concatenate([term.factors(layer.shape) for term in layer.terms])
        even, _ = recompress(factors.scaled(fused.strength_of(name)))
        layers[name] = AdapterLayer(layer.shape, (plain_term(even),) if even.rank else ())
    return replace(fused, layers=layers, strength=1.0, layer_strengths=())


def default_rate(student: Adapter, parts: Sequence[str]) -> float:
    """AdamW's learning rate that moves the parameters of these parts by a small share of their size per step:
    it suits every model, because the student is not new but nearly right."""
    values = [
        tensor.detach().float()
        for name, layer in student.layers.items()
        if name.partition(".")[0] in parts
        for term in layer.terms
        for tensor in term.params.values()
    ]
    count = sum(v.numel() for v in values)
    power = sum(float(v.square().sum()) for v in values) / max(count, 1)
    return RATE * power**0.5 or 1e-4  # an update of zeros has no size


def settled(config: TrainConfig, student: Adapter, parts: Sequence[str]) -> TrainConfig:
    """The settings as the trainer gets them: with a rate where none is given, and no captions dropped, which
    the examples do themselves. Prodigy finds its rate itself."""
    rate = config.learning_rate
    if not rate and config.optimiser != "prodigy":
        rate = default_rate(student, parts)
    return replace(config, learning_rate=rate, caption_dropout=0.0)


@dataclass(frozen=True)
class DistilDenoiser:
    """What the student predicts minus what it should; the trainer's denoiser with
    :class:`.towards_prediction.ResidualNoise`.

    teachers: every concept's attachments, at the strength that counts as 1. All attachments are on the same
    tree; between calls the student alone acts.
    """

    predict: Predict
    student: Sequence[Attachment]
    teachers: Sequence[Sequence[Attachment]]
    noise: NoiseProcess
    examples: Sequence[DistilExample]

    def __post_init__(self) -> None:
        self._only(self.student)

    def __call__(self, noisy: Tensor, timesteps: Tensor, indices: Sequence[int | None]) -> Tensor:
        rows = [i for i in indices if i is not None]
        if len(rows) != len(indices):
            raise SpectralAdapterError("a distillation has its own empty captions: set caption_dropout to 0")
        try:
            wanted = self._wanted(noisy, timesteps, rows)
        finally:
            self._only(self.student)
        self._set_progress(self.student, timesteps)
        return self.predict(noisy, timesteps, rows, False).float() - wanted

    @torch.no_grad()
    def _wanted(self, noisy: Tensor, timesteps: Tensor, rows: Sequence[int]) -> Tensor:
        wanted = torch.empty_like(noisy, dtype=torch.float32)
        for concept in sorted({self.examples[i].concept for i in rows}):
            places = [place for place, i in enumerate(rows) if self.examples[i].concept == concept]
            teacher = () if concept == BASE else self.teachers[concept]
            self._only(teacher)
            self._set_progress(teacher, timesteps[places])
            found = self.predict(noisy[places], timesteps[places], [rows[p] for p in places], True)
            wanted[places] = found.float()
        return wanted

    def _set_progress(self, attachments: Sequence[Attachment], timesteps: Tensor) -> None:
        for attachment in attachments:
            attachment.set_progress(self.noise.progress(timesteps))

    def _only(self, active: Sequence[Attachment]) -> None:
        for group in (self.student, *self.teachers):
            for attachment in group:
                attachment.set_strength(1.0 if any(attachment is a for a in active) else 0.0)
