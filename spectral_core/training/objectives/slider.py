"""Concept sliders: an adapter learned from a pair of prompts, without pictures (Gandikota et al., ECCV 2024,
arXiv 2311.12092, as FouRA trains it, arXiv 2406.08798).

At strength ±1 the adapted model shall predict for the neutral prompt what the frozen one does, moved along
the difference of the two poles:

    ε(x_t, neutral; ±1)  =  ε(x_t, neutral) ± η·(ε(x_t, positive) − ε(x_t, negative))

The difference is in the model's own kind of prediction: for a v- or flow model it is the same direction at
another scale. x_t are noised samples of the frozen model. With ``start`` the adapter acts, and is trained,
from that progress on only: what comes before decides the picture's layout, which is then kept.

Shapes: noisy (B, C, H, W), timesteps (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...adapter.schedule import Schedule
from ...attach.attaching import Attachment
from ...errors import SpectralAdapterError
from ..config.adapter import AdapterSettings, SampleSettings
from ..config.setting import setting
from .diffusion import UNIFORM, NoiseProcess, Shares
from .towards_prediction import ResidualNoise

Predict = Callable[[Tensor, Tensor, Sequence[str]], Tensor]
"""The model: (noisy, timesteps, a prompt for each row) -> prediction."""

_TRIES = 512  # draws of a noise level behind ``start``; at 0.9 one in ten lies there, of shifted flows fewer


@dataclass(frozen=True)
class SliderSettings(AdapterSettings, SampleSettings):
    """positive, negative: the poles. neutral: what is moved; ``{}`` in a prompt is where an attribute goes.

    preserve: attributes that shall not move with the slider, a subject each or whatever else; the more, the
    less the slider learns of what usually comes with its pole. eta: how far strength 1 moves, as a share of
    the difference of the poles. start: progress from which the adapter acts, 0.2 is FouRA's t = 800. samples:
    pictures of the neutral prompt that are drawn first, with ``sample_steps`` and ``guidance``, to be noised.
    method, rank and the rest of the adapter: :class:`..config.adapter.AdapterSettings`.
    """

    positive: str
    negative: str
    neutral: str = setting("{}", "The prompt that is moved.", "slider", metavar="PROMPT")
    preserve: tuple[str, ...] = setting(
        (), "An attribute that shall stay; may be given several times.", "slider", metavar="TEXT"
    )
    eta: float = setting(
        1.0,
        "How far strength 1 moves, as a share of the poles' difference.",
        "slider",
        least=0,
        ends="(]",
        metavar="X",
    )
    start: float = setting(
        0.2,
        "Progress from which it acts, 0 the noisiest; keeps the layout of pictures.",
        "slider",
        least=0,
        most=1,
        ends="[)",
        metavar="P",
    )

    def __post_init__(self) -> None:
        self.check()
        if not self.positive.strip() or not self.negative.strip() or self.positive == self.negative:
            raise SpectralAdapterError(
                f"poles {self.positive!r} and {self.negative!r}: expected two different prompts"
            )

    def settings(self) -> dict[str, Any]:
        """What the result depends on, JSON-able."""
        values = {k: v for k, v in asdict(self).items() if k in SliderSettings.__dataclass_fields__}
        for name in ("alpha", "train_scale", "gate_budget"):  # which runs of earlier versions did not have
            if not values[name]:
                del values[name]
        return values | {
            key: None if values[key] is None else list(values[key]) for key in ("preserve", "columns", "size")
        }

    @property
    def schedule(self) -> Schedule | None:
        """Of the finished adapter: it acts where it was trained."""
        return Schedule.window(self.start, 1.0) if self.start > 0 else None


@dataclass(frozen=True)
class SliderExample:
    """One direction of the slider on one sample; sign is the strength, 1 or −1."""

    neutral: str
    positive: str
    negative: str
    sign: int

    repeats = 1  # of an epoch


def with_attribute(prompt: str, attribute: str) -> str:
    """The attribute where the prompt holds ``{}``, else in front of it."""
    if "{}" in prompt:
        return " ".join(prompt.replace("{}", attribute).split())
    return f"{attribute} {prompt}".strip()


def examples(
    neutral: str, positive: str, negative: str, preserve: Sequence[str], samples: int
) -> list[SliderExample]:
    """Both directions for each sample; sample k shows the k-th attribute to be preserved, in turn.

    Examples 2k and 2k + 1 belong to sample k.
    """
    found = []
    for k in range(samples):
        attribute = preserve[k % len(preserve)] if preserve else ""
        texts = [with_attribute(prompt, attribute) for prompt in (neutral, positive, negative)]
        found += [SliderExample(texts[0], texts[1], texts[2], sign) for sign in (1, -1)]
    return found


@dataclass(frozen=True)
class SliderNoise(ResidualNoise):
    """The model's noise without levels before ``start`` (progress 0 … 1)."""

    start: float = 0.0

    def sample_timesteps(self, count: int, generator: torch.Generator, shares: Shares = UNIFORM) -> Tensor:
        levels = self.inner.sample_timesteps(count, generator, shares)
        for _ in range(_TRIES):
            early = self.inner.progress(levels) < self.start
            if not early.any():
                return levels
            again = self.inner.sample_timesteps(count, generator, shares)
            levels = torch.where(early, again, levels)
        raise SpectralAdapterError(
            f"start {self.start}: hardly any noise level of this distribution lies behind it; use timesteps "
            "'uniform' or an earlier start"
        )

    def levels(self, count: int) -> Tensor:
        """At most ``count``, spread evenly over what lies behind ``start``."""
        found = self.inner.levels(4 * count)
        found = found[self.inner.progress(found) >= self.start]
        places = torch.linspace(0, len(found) - 1, min(count, len(found))).round().long()
        return found[places.to(found.device)]


@dataclass(frozen=True)
class SliderDenoiser:
    """What the adapted model predicts minus what it should; the trainer's denoiser with :class:`SliderNoise`.

    eta: how far ±1 moves, as a share of the difference of the poles.
    """

    predict: Predict
    attachments: Sequence[Attachment]
    noise: NoiseProcess
    examples: Sequence[SliderExample]
    eta: float = 1.0

    def __call__(self, noisy: Tensor, timesteps: Tensor, indices: Sequence[int | None]) -> Tensor:
        rows = [self.examples[i] for i in indices if i is not None]
        if len(rows) != len(indices):
            raise SpectralAdapterError("a slider has no captions to drop: set caption_dropout to 0")
        try:
            wanted = self._wanted(noisy, timesteps, rows)
            missing = torch.empty_like(wanted)
            for sign in (1, -1):
                places = [i for i, row in enumerate(rows) if row.sign == sign]
                if places:
                    prompts = [rows[i].neutral for i in places]
                    found = self._predict(noisy[places], timesteps[places], prompts, float(sign))
                    missing[places] = found.float() - wanted[places]
        finally:
            self._set(timesteps, 1.0)
        return missing

    @torch.no_grad()
    def _wanted(self, noisy: Tensor, timesteps: Tensor, rows: Sequence[SliderExample]) -> Tensor:
        prompts = [text for kind in ("neutral", "positive", "negative") for text in _column(rows, kind)]
        tripled, levels = noisy.repeat(3, *(1,) * (noisy.dim() - 1)), timesteps.repeat(3)
        neutral, positive, negative = self._predict(tripled, levels, prompts, 0.0).float().chunk(3)
        signs = torch.tensor([float(row.sign) for row in rows], device=noisy.device)
        return neutral + self.eta * signs.reshape(-1, *(1,) * (noisy.dim() - 1)) * (positive - negative)

    def _predict(self, noisy: Tensor, timesteps: Tensor, prompts: Sequence[str], strength: float) -> Tensor:
        self._set(timesteps, strength)
        return self.predict(noisy, timesteps, prompts)

    def _set(self, timesteps: Tensor, strength: float) -> None:
        progress = self.noise.progress(timesteps)
        for attachment in self.attachments:
            attachment.set_progress(progress)
            attachment.set_strength(strength)


def _column(rows: Sequence[SliderExample], kind: str) -> list[str]:
    return [str(getattr(row, kind)) for row in rows]
