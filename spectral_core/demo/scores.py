"""Numbers about pictures, read by the classifier that ships with the embedded model.

Concept score: mean cosine similarity between the features of samples and of the concept's own pictures, −1
… 1. Shapes: pictures become (N, 3, H, W) in [0, 1]; the classifier brings them to its own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..training.data.folder import find_examples, load_pictures
from .concepts import PLACES, DemoConcept, places


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> (N, 3, H, W) in [0, 1]."""
    arrays = np.stack([np.asarray(p.convert("RGB"), dtype=np.float32) for p in pictures])
    return torch.from_numpy(arrays / 255).permute(0, 3, 1, 2)


class Scorer:
    """Concept scores and attribute accuracy, with the shipped classifier."""

    def __init__(self, folder: Path) -> None:
        from demo_model.classifier import load_classifier

        self._classifier: Any = load_classifier(folder / "classifier")
        self._known: dict[str, Tensor] = {}

    def _features_of(self, concept: DemoConcept) -> Tensor:
        if concept.name not in self._known:
            examples = find_examples(concept.folder, concept.token)
            size = self._classifier.image_size
            pictures = load_pictures(examples, size, size) / 2 + 0.5
            self._known[concept.name] = self._classifier.features(pictures)
        return self._known[concept.name]

    def concept_score(self, concept: DemoConcept, pictures: Sequence[Image.Image]) -> float:
        features: Tensor = self._classifier.features(as_tensor(pictures))
        return float((features @ self._features_of(concept).T).mean())

    def own_score(self, concept: DemoConcept) -> float:
        """What the concept's own pictures score among themselves (each against the others): the ceiling."""
        features = self._features_of(concept)
        similarity = features @ features.T
        n = len(features)
        return float((similarity.sum() - similarity.diagonal().sum()) / max(1, n * (n - 1)))

    def knows(self, concept: DemoConcept) -> bool:
        """Whether the classifier has a name for it: it learned the drawn characters, from drawings."""
        return concept.drawn and concept.name in self._classifier.labels["character"]

    def named(self, concept: DemoConcept, pictures: Sequence[Image.Image]) -> float:
        """Share of the pictures that are read as this character."""
        return fmean(self._read(concept, pictures))

    def both_named(self, concepts: Sequence[DemoConcept], pictures: Sequence[Image.Image]) -> float:
        """Share of the pictures in whose left half the first character is read, in the right the second."""
        halves = zip(*map(sides, pictures), strict=True)
        read = [self._read(c, half) for c, half in zip(concepts, halves, strict=True)]
        return fmean(all(one) for one in zip(*read, strict=True))

    def _read(self, concept: DemoConcept, pictures: Sequence[Image.Image]) -> list[bool]:
        names = self._classifier.attributes(as_tensor(pictures))["character"]
        return [name == concept.name for name in names]

    def background_accuracy(self, pictures: Sequence[Image.Image]) -> float:
        """Share of pictures whose background is the one that their prompt asked for."""
        read = self._classifier.attributes(as_tensor(pictures))["background"]
        wanted = [PLACES[place] for place in places(len(pictures))]
        return float(sum(a == b for a, b in zip(read, wanted, strict=True)) / len(wanted))


def sides(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The left and the right half's middle, each a square as wide as the half."""
    half, top = picture.width // 2, (picture.height - picture.width // 2) // 2
    left, right = ((x, top, x + half, top + half) for x in (0, half))
    return picture.crop(left), picture.crop(right)
