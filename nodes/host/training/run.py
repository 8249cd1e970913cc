"""Train Adapter: a named run on the host's own model; see
:mod:`....spectral_core.training.engine.named_run`.

Adapters lie in ``output/spectral_adapters``, runs in ``output/spectral_adapters_runs``.

Shapes: those of :mod:`.model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ....spectral_core.adapter.fingerprint import digest_of, fingerprint
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.training.data.held_out import held_out_of
from ....spectral_core.training.engine.named_run import Trained
from ....spectral_core.training.objectives.preservation import said_of
from ..model.words import pieces
from . import data as training_data
from . import identity, start
from . import text as training_text
from .data import Data, Pictures
from .defaults import fitted, pixels_per_cell
from .job import Job
from .prepare import Inputs, prepared
from .progress import Progress, check_interrupt


def run(job: Job, given: Inputs, said: Sequence[str] = ()) -> Trained:
    """Train the job, or go on with it, or return what it has made.

    Raises SpectralAdapterError before the first step for everything that can be known then, the host's
    interrupt where the user stops it (the checkpoint is kept), and whatever else ends a training. The MODEL
    is afterwards as it was. said: notes on the job, which are told with the others.
    """
    job, more = fitted(job, given.model, pixels_per_cell(given.vae))
    with torch.inference_mode(False), torch.no_grad():
        shown = _source(job, given)
        words = _words(job, given)
        continued, weights, notes = start.layers(job, given.model, given.clip)
        origin = start.Origin(given.model, continued, weights, fingerprint(weights))
    progress = Progress(job.config.steps, job.run_name)
    return progress.carry_out(
        job.config,
        _settings(job, given, shown, origin.base),
        partial(start.begin, job, origin),
        partial(prepared, job, given, words, partial(_data, job, shown, given), progress.cancel),
        [*said, *more, *_of_the_word(job, given.clip), *notes],
        job.checkpoint_every,
        job.sample_every,
    )


@dataclass(frozen=True)
class Source:
    """What is trained on, as far as it must be known to tell one run from another, and the prior pictures."""

    concept: Data | Pictures
    prior: Pictures | None
    judging: Pictures | None = None

    @property
    def digest(self) -> str:
        found = self.concept.digest + ("" if self.prior is None else f" {self.prior.digest}")
        return found + ("" if self.judging is None else f" judged by {self.judging.digest}")

    @property
    def captions(self) -> list[str]:
        """Of the concept's pictures; none of connected conditionings, which are encoded already."""
        return [] if isinstance(self.concept, Data) else [e.caption for e in self.concept.examples]


def _source(job: Job, given: Inputs) -> Source:
    if job.images and (given.latents or given.conditionings):
        raise SpectralAdapterError(
            "images and latents are both given: choose 'none' as images, or disconnect latents and "
            "conditioning"
        )
    if job.needs_vae:
        missing = [name for name in ("vae", "clip") if getattr(given, name) is None]
        if missing:
            name = next(n for n in ("images", "prior_images", "validation_images") if getattr(job, n))
            raise SpectralAdapterError(
                f"{name} {getattr(job, name)!r}: {' and '.join(missing)} not connected; a folder of pictures "
                "needs the model's VAE and CLIP"
            )
        framing = training_data.Framing(job.resolution, job.buckets, pixels_per_cell(given.vae))
    prior = None
    if job.prior_images:
        prior = training_data.look_at_prior(job.prior_images, job.init_words, framing)
    judging = None
    if job.validation_images:
        judging = training_data.look_at(job.validation_images, job.trigger_word, framing)
    if job.images:
        return Source(training_data.look_at(job.images, job.trigger_word, framing), prior, judging)
    if not given.latents or not given.conditionings:
        raise SpectralAdapterError(
            "nothing to train on: choose a folder as images (with vae and clip connected), or connect "
            "latents and conditioning"
        )
    data = training_data.from_nodes(given.model, given.latents, given.conditionings, given.clip)
    return Source(data, prior, judging)


def _settings(job: Job, given: Inputs, shown: Source, base: Mapping[str, Any]) -> dict[str, Any]:
    """What the result depends on; compared when a run of this name is there already."""
    found = {"job": job.settings(), "pictures": shown.digest, "model": digest_of(base)}
    if job.needs_vae:
        found["vae"] = identity.digest_of_weights(given.vae.patcher)
    if given.clip is not None:
        found["clip"] = identity.digest_of_weights(given.clip.patcher)
    if patches := identity.patches_of(given.model, given.clip):
        found["patches"] = patches
    return found


def _of_the_word(job: Job, clip: Any) -> list[str]:
    """What to say of a trigger word that the CLIP does not take for one word."""
    word = job.trigger_word.strip()
    if not word or clip is None or not job.images or job.init_words.strip():
        return []
    found = pieces(clip, word)
    if len(found) < 2:
        return []
    return [
        f"trigger_word {word!r}: the CLIP splits it into {' + '.join(found)}, whose meaning comes along; "
        "for a word of its own set init_words (Training: Text Encoder)"
    ]


def _words(job: Job, given: Inputs) -> dict[str, dict[str, torch.Tensor]]:
    """The new word with its first rows by text encoder; nothing where none is wanted."""
    word = job.trigger_word.strip()
    if not job.init_words.strip():
        return {}
    return {word: training_text.initial_rows(given.clip, word, job.init_words)}


def _data(job: Job, shown: Source, given: Inputs) -> Data:
    clip = None if job.trains_text else given.clip

    def encoded(pictures: Pictures) -> Data:
        return training_data.from_pictures(given.model, pictures, given.vae, clip, check_interrupt)

    data = shown.concept if isinstance(shown.concept, Data) else encoded(shown.concept)
    if shown.judging is not None:
        data = data.judged_by(encoded(shown.judging))
    else:
        data = replace(data, held_out=held_out_of(len(data.latents), job.validation_share))
    if job.config.preserve_every:
        said = said_of(job, job.trigger_word.strip() if job.images else "", shown.captions)
        data = training_data.add_preserved(data, said, given.clip)
    return data if shown.prior is None else data.with_prior(encoded(shown.prior))
