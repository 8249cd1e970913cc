"""The concept and nothing else: what the model predicts without the adapter is learned beside the concept,
under prompts that do not show it.

    loss = mean (F(x_t, prompt; adapter) − F(x_t, prompt))²

This is prior preservation (Ruiz et al., CVPR 2023, arXiv 2208.12242) with the model's own predictions in
place of pictures that it has drawn: x_t are the concept's noised latents, the prompts everyday ones and the
captions with the class's word in place of the concept's. F without the adapter is the same model with the
adapter off, which is exact and needs no second copy.

Shapes: those of :mod:`.losses`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...statistics.prompts import PRESERVE
from ..config.adapter import ConceptSettings

_CLASSED = 0.5  # share of the rows that show the picture's own caption, of those that have one


@dataclass(frozen=True)
class Preserved:
    """What the denoiser is told in place of an example: the numbers of everyday prompts, and by example that
    of its caption with the class's word."""

    prompts: Sequence[int]
    classed: Mapping[int, int] = field(default_factory=dict)

    def choose(self, examples: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
        """What is said of each example."""
        found = []
        draws = torch.rand(2 * len(examples), generator=generator).tolist()
        for example, which, place in zip(examples, draws[::2], draws[1::2], strict=True):
            own = self.classed.get(example)
            if own is not None and (which < _CLASSED or not self.prompts):
                found.append(own)
            else:
                found.append(self.prompts[int(place * len(self.prompts))])
        return tuple(found)


@dataclass(frozen=True)
class Said:
    """The same as words: everyday prompts, and by example its caption with the class's word."""

    prompts: tuple[str, ...] = ()
    classed: Mapping[int, str] = field(default_factory=dict)

    def numbered(self, first: int) -> tuple[dict[int, str], Preserved | None]:
        """Every text with a number, from ``first`` downwards, and what the trainer is told by them."""
        texts = list(dict.fromkeys((*self.prompts, *self.classed.values())))
        numbers = {text: first - k for k, text in enumerate(texts)}
        if not texts:
            return {}, None
        classed = {example: numbers[text] for example, text in self.classed.items()}
        told = Preserved([numbers[prompt] for prompt in self.prompts], classed)
        return {number: text for text, number in numbers.items()}, told


def said_of(settings: ConceptSettings, word: str, captions: Sequence[str]) -> Said:
    """What is kept beside a concept of these captions, whose word is ``word``.

    Without a word nothing tells the concept from anything else: what is kept then are the prompts that are
    given, and nothing where none are.
    """
    given = tuple(p.strip() for p in settings.preserve_prompts.split("|") if p.strip())
    if not word and not given:
        return Said()
    prompts = tuple(p for p in given or PRESERVE if not (word and _whole(word).search(p)))
    class_words = settings.class_words.strip() or settings.init_words.strip()
    classed = {i: with_class(text, word, class_words) for i, text in enumerate(captions) if class_words}
    return Said(prompts, {i: text for i, text in classed.items() if text})


def with_class(caption: str, word: str, class_words: str) -> str:
    """The caption with the class's words in place of the concept's; empty where it does not have that.

    >>> with_class("a <bot> on a chair", "<bot>", "robot")
    'a robot on a chair'
    """
    return _whole(word).sub(class_words, caption) if word and _whole(word).search(caption) else ""


def _whole(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
