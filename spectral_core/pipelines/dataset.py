"""Pictures and captions of a job as latents, masks and conditioning of a pipeline, cached on disk.

Shapes: latents (C, h, w) per example in its bucket's size; masks (1, h, w) in [0, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SpectralAdapterError
from ..training.data.buckets import assign_buckets
from ..training.data.disk_cache import TensorCache, digest_of_module, key_of
from ..training.data.folder import Example, find_examples, load_mask, load_picture, picture_size
from ..training.data.held_out import held_out_of
from ..training.engine.checks import caption_warnings
from ..training.objectives.preservation import Preserved, said_of
from .conditioning import Conditioning, encode, joined_rows
from .job import Job
from .loading import TEXT_PARTS


@dataclass(frozen=True)
class Dataset:
    """The examples (the prior ones behind the concept's), the bucket of each, and what was odd about them.

    held_out: those that judge the training. said: the texts of which the trainer is told by ``preserved``,
    by their numbers below 0.
    """

    examples: tuple[Example, ...]
    sizes: tuple[tuple[int, int], ...]
    concept_count: int
    notes: tuple[str, ...]
    held_out: tuple[int, ...] = ()
    said: Mapping[int, str] = field(default_factory=dict)
    preserved: Preserved | None = None

    def caption(self, number: int | None) -> str:
        """What the denoiser is told of an example, or of another number; None is the empty caption."""
        if number is None:
            return ""
        return self.said[number] if number < 0 else self.examples[number].caption

    def shown(self, prior: bool) -> list[Example]:
        """The examples, with no repeats of those that are not the concept's (not the prior ones)."""
        return [
            e if (i >= self.concept_count) == prior and i not in self.held_out else replace(e, repeats=0)
            for i, e in enumerate(self.examples)
        ]

    @property
    def digest(self) -> str:
        """Changes with every picture, caption, repeat and mask."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.caption, example.repeats)).encode())
            for path in filter(None, (example.path, example.mask)):
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        if self.held_out:
            digest.update(repr(self.held_out).encode())
        return digest.hexdigest()[:16]


def find_dataset(pipe: Any, job: Job) -> Dataset:
    """Every picture of the job, looked at before anything is trained.

    Raises SpectralAdapterError for a folder without pictures, a broken picture, a size that does not fit.
    """
    step = latent_factor(pipe)
    if job.size[0] % step or job.size[1] % step:
        raise SpectralAdapterError(f"size {job.size[0]}×{job.size[1]}: expected multiples of {step} pixels")
    concept = find_examples(job.folder, job.token)
    notes = caption_warnings(concept)
    if job.validation_images:
        judging = find_examples(job.validation_images, job.token)
        held_out = tuple(range(len(concept), len(concept) + len(judging)))
        concept += judging
    else:
        held_out = held_out_of(len(concept), job.validation_share)
    said, preserved = said_of(job, job.token, [e.caption for e in concept]).numbered(-1)
    prior: list[Example] = []
    if job.prior_images:
        plain = f"a picture of {job.init_words}" if job.init_words else ""
        prior = find_examples(job.prior_images)
        prior = [e if e.captioned else replace(e, caption=plain) for e in prior]
    examples = (*concept, *prior)
    shown = [picture_size(e.path) for e in examples]
    for example in examples:
        if example.mask is not None:
            picture_size(example.mask)
    sizes = assign_buckets(shown, job.size, max(step, 8)) if job.buckets else [job.size] * len(examples)
    return Dataset(examples, tuple(sizes), len(concept), tuple(notes), held_out, said, preserved)


def latent_factor(pipe: Any) -> int:
    """Pixels per latent: sizes must be multiples of it."""
    return int(2 ** (len(pipe.vae.config.block_out_channels) - 1))


@torch.no_grad()
def encode_dataset(pipe: Any, dataset: Dataset, cache: Path | None) -> list[Tensor]:
    """The latents of every example, on the denoiser's device in float32; noise is added in that precision."""
    store = TensorCache(None if cache is None else cache / "latents")
    vae = pipe.vae
    digest = digest_of_module(vae) if cache is not None else ""
    latents = []
    for example, size in zip(dataset.examples, dataset.sizes, strict=True):

        def compute(example: Example = example, size: tuple[int, int] = size) -> dict[str, Tensor]:
            return {"latent": encode_pictures(pipe, load_picture(example.path, *size)[None])[0]}

        key = key_of(picture=example.path.read_bytes(), size=list(size), vae=digest)
        latents.append(store.get_or_compute(key, compute)["latent"].to(pipe.unet.device))
    return latents


@torch.no_grad()
def encode_pictures(pipe: Any, pictures: Tensor, batch_size: int = 8) -> Tensor:
    """Latents (N, C, h, w) in float32 of pictures (N, 3, H, W) in [−1, 1]: the encoder's mean, scaled as the
    denoiser wants it."""
    vae, parts = pipe.vae, []
    for chunk in pictures.split(batch_size):
        mean = vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist.mode().float()
        parts.append((mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor)
    return torch.cat(parts)


def masks_of(dataset: Dataset, latents: Sequence[Tensor]) -> list[Tensor | None] | None:
    """The masks at the latents' sizes; None where no picture has one."""
    if all(e.mask is None for e in dataset.examples):
        return None
    masks: list[Tensor | None] = []
    for example, size, latent in zip(dataset.examples, dataset.sizes, latents, strict=True):
        if example.mask is None:
            masks.append(None)
        else:
            mask = load_mask(example.mask, *size)[None]
            masks.append(F.interpolate(mask, latent.shape[-2:], mode="area")[0].to(latent.device))
    return masks


class Captions:
    """Conditioning of captions; kept in memory and on disk while nothing in the text encoders trains."""

    def __init__(self, pipe: Any, keep: bool, cache: Path | None) -> None:
        self._pipe, self._keep = pipe, keep
        self._store = TensorCache(None if cache is None or not keep else cache / "captions")
        self._known: dict[tuple[str, tuple[int, int]], Conditioning] = {}
        parts = [getattr(pipe, name, None) for name in TEXT_PARTS] if self._store.folder else []
        self._digest = [digest_of_module(part) for part in parts if part is not None]

    def encode(self, captions: Sequence[str], size: tuple[int, int]) -> Conditioning:
        """Keyword arguments for the denoiser, a row for each caption; size is the batch's bucket."""
        if not self._keep:
            return encode(self._pipe, captions, size)
        for caption in dict.fromkeys(captions):
            if (caption, size) not in self._known:
                self._known[caption, size] = self._kept(caption, size)
        return joined_rows([self._known[caption, size] for caption in captions])

    @torch.no_grad()
    def _kept(self, caption: str, size: tuple[int, int]) -> Conditioning:
        key = key_of(
            caption=caption, size=list(size), encoders=self._digest, dtype=str(self._pipe.unet.dtype)
        )
        found = self._store.get_or_compute(key, lambda: _flat(encode(self._pipe, [caption], size)))
        return _nested({name: value.to(self._pipe.unet.device) for name, value in found.items()})


def _flat(conditioning: Conditioning, prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in conditioning.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _nested(flat: dict[str, Tensor]) -> Conditioning:
    found: Conditioning = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        place = found
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return found
