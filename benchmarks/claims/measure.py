"""What is read from generated pictures.

Shapes: features (N, 128) of length one, so that 1 − their dot product is a distance in [0, 2].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.claims.drawings import BACKGROUNDS, STYLES
from benchmarks.claims.lab import HELD_OUT_SEED, Lab, Task
from demo_model import draw
from demo_model.pictures import WIDE, draw_beside
from spectral_core.adapter.adapter import Adapter
from spectral_core.demo.scores import as_tensor, sides
from spectral_core.pipelines.loading import EMBEDDED

UNRELATED = 8  # prompts without any concept
JUDGED = (
    "a small <{}> on a {} background",
    "a large <{}> on a {} gradient background",
    "a <{}> on a {} background, on the left",
    "a large <{}> on a {} background, at the bottom",
)
"""Wordings under which characters are judged; no fusion is fitted to them (those are ``FITTED``)."""
FITTED = "a <{}> on a {} background"
COPY_QUANTILE = 0.05


def diversity(features: Tensor, groups: int) -> float:
    """Mean distance between pictures of one prompt; features (groups · n, D), prompt after prompt."""
    each = features.unflatten(0, (groups, -1))
    n = each.shape[1]
    distances = 1 - each @ each.mT
    return float(distances.sum() / (groups * n * (n - 1)))


@dataclass
class StyleMeter:
    """Pictures of a style: how strong, how right, how diverse, how much copied."""

    lab: Lab
    style: str

    @cached_property
    def scenes(self) -> list[tuple[str, str]]:
        """(colour, shape) of the prompts: what they leave open is up to the model."""
        shapes, colours = list(draw.SHAPES), list(draw.COLOURS)
        return [(colours[(3 * i + 1) % 8], shapes[i % 8]) for i in range(self.lab.setting.prompts)]

    def prompts(self, words: str) -> list[str]:
        per = self.lab.setting.per_prompt
        return [f"{words} a {colour} {shape}" for colour, shape in self.scenes for _ in range(per)]

    def pictures(self, adapters: Sequence[Adapter], words: str | None = None) -> list[Image.Image]:
        prompts = self.prompts(self.style if words is None else words)
        return self.lab.draw(prompts, [7000 + i for i in range(len(prompts))], adapters)

    def read(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """Style strengths, the weaker of them (``both``), share of the right shape and colour, diversity."""
        judge, per = self.lab.judge, self.lab.setting.per_prompt
        wanted = [scene for scene in self.scenes for _ in range(per)]
        shapes, colours = judge.read("shape", pictures), judge.read("colour", pictures)
        right = [(c, s) == want for c, s, want in zip(colours, shapes, wanted, strict=True)]
        strengths = {style: judge.probability(style, "yes", pictures) for style in STYLES}
        return {
            **{style: float(value.mean()) for style, value in strengths.items()},
            "both": float(torch.stack(list(strengths.values())).amin(0).mean()),
            "right": sum(right) / len(right),
            "diversity": diversity(judge.features(pictures), len(self.scenes)),
        }

    def copied(self, pictures: Sequence[Image.Image], seed: int, count: int) -> float:
        """Share of pictures nearer to a training picture than the nearest 5 % of unseen drawings are."""
        judge, task = self.lab.judge, Task("style", self.style)
        shown = judge.features([p for p, _ in task.pictures(1000 * (seed + 1), count)])
        unseen = judge.features([p for p, _ in task.pictures(HELD_OUT_SEED + 1000, 200)])
        limit = torch.quantile((1 - unseen @ shown.mT).amin(1), COPY_QUANTILE)
        nearest = (1 - judge.features(pictures) @ shown.mT).amin(1)
        return float((nearest < limit).float().mean())


def _half(square: Image.Image, side: str) -> Image.Image:
    """Of a wide picture's square end, the part that :func:`sides` gives of the whole."""
    half = WIDE[0] // 2
    left, top = (0 if side == "left" else square.width - half), (square.height - half) // 2
    return square.crop((left, top, left + half, top + half))


@dataclass
class CharacterMeter:
    """Pictures of characters: who is on them, on the background that was asked for."""

    lab: Lab
    names: Sequence[str]
    tasks: Mapping[str, Task] = field(default_factory=dict)  # where they are not characters

    @cached_property
    def _classifier(self) -> Any:
        from demo_model.classifier import load_classifier

        return load_classifier(EMBEDDED / "classifier")

    @cached_property
    def _own(self) -> dict[str, Tensor]:
        return {
            name: self._classifier.features(
                as_tensor([p for p, _ in self.tasks.get(name, Task("character", name)).pictures(1000, 24)])
            )
            for name in self.names
        }

    def prompts(self, name: str) -> list[tuple[str, str]]:
        """(prompt, its background), every wording with every background in turn."""
        return [
            (JUDGED[(i + j) % len(JUDGED)].format(name, background), background)
            for i, background in enumerate(BACKGROUNDS)
            for j in range(self._each)
        ]

    @property
    def _each(self) -> int:
        """Pictures on every background."""
        return max(1, self.lab.setting.pictures // 10)

    def certainty(self, name: str, adapters: Sequence[Adapter]) -> float:
        """The judge's of the character, under the wordings that fusions are fitted to."""
        prompts = [FITTED.format(name, background) for background in BACKGROUNDS]
        pictures = self.lab.draw(prompts, [6000 + i for i in range(len(prompts))], adapters)
        return float(self.lab.judge.probability("character", name, pictures).mean())

    def together(self, adapters: Sequence[Adapter]) -> float:
        """Two characters in one wide picture: the share of pictures with each in its half; the mean over the
        pairs."""
        found = []
        for first, second in itertools.combinations(self.names, 2):
            asked = f"a large <{first}> and a large <{second}>"
            prompts = [f"{asked} on a {background} background" for background in BACKGROUNDS] * self._each
            seeds = [8500 + i for i in range(len(prompts))]
            halves = zip(*map(sides, self.lab.draw(prompts, seeds, adapters, size=WIDE)), strict=True)
            found.append(self._both((first, second), list(halves)))
        return fmean(found) if found else 0.0

    def together_drawn(self) -> float:
        """The same of drawings, each half with one of the characters: what the judge reads of it at best."""
        found = []
        for pair in itertools.combinations(self.names, 2):
            halves = [
                [_half(draw_beside(name, 5000 + i, side=side)[0], side) for i in range(8 * self._each)]
                for name, side in zip(pair, ("left", "right"), strict=True)
            ]
            found.append(self._both(pair, halves))
        return fmean(found) if found else 0.0

    def _both(self, pair: Sequence[str], halves: Sequence[Sequence[Image.Image]]) -> float:
        read = zip(pair, halves, strict=True)
        sure = [self.lab.judge.probability("character", name, half) > 0.5 for name, half in read]
        return float(torch.stack(sure).all(0).float().mean())

    def read(
        self,
        name: str,
        adapters: Sequence[Adapter],
        strip: str = "",
        prompts: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """fidelity: the judge's certainty of the character; crosstalk: of any of the others; background:
        share of the right ones; similarity: to the character's own pictures, in the shipped classifier's
        features. Of prompts of one's own: the similarity alone."""
        if prompts is not None:
            pictures = self.lab.draw(prompts, [8000 + i for i in range(len(prompts))], adapters)
            if strip:
                self.lab.keep_strip(strip, pictures)
            return {"similarity": self._similarity(name, pictures)}
        prompts, wanted = zip(*self.prompts(name), strict=True)
        pictures = self.lab.draw(prompts, [8000 + i for i in range(len(prompts))], adapters)
        if strip:
            self.lab.keep_strip(strip, pictures)
        seen = self._classifier.attributes(as_tensor(pictures))["background"]
        judge = self.lab.judge
        others = [judge.probability("character", n, pictures) for n in self.names if n != name]
        return {
            "fidelity": float(judge.probability("character", name, pictures).mean()),
            "crosstalk": float(torch.stack(others).sum(0).mean()) if others else 0.0,
            "background": sum(a == b for a, b in zip(seen, wanted, strict=True)) / len(wanted),
            "similarity": self._similarity(name, pictures),
        }

    def _similarity(self, name: str, pictures: Sequence[Image.Image]) -> float:
        return float((self._classifier.features(as_tensor(pictures)) @ self._own[name].mT).mean())

    @cached_property
    def _unrelated(self) -> tuple[list[str], Tensor]:
        rng = np.random.default_rng(5)
        prompts = [draw.full_caption(draw.random_scene(rng, evaluation=True)) for _ in range(UNRELATED)]
        return prompts, self.lab.judge.features(self.lab.draw(prompts, range(9000, 9000 + UNRELATED), []))

    def unrelated(self, adapters: Sequence[Adapter]) -> dict[str, float]:
        """Under prompts without a concept, which no fusion sees. drift: mean distance from the base model's
        pictures of the same seeds; leak: the judge's certainty that a character is there."""
        prompts, base = self._unrelated
        pictures = self.lab.draw(prompts, range(9000, 9000 + UNRELATED), adapters)
        seen = torch.stack([self.lab.judge.probability("character", n, pictures) for n in self.names])
        drift = (1 - (self.lab.judge.features(pictures) * base).sum(1)).mean()
        return {"drift": float(drift), "leak": float(seen.sum(0).mean())}
