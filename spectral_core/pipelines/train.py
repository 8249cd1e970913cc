"""Train an adapter on a diffusers pipeline as a named run: resumed, returned when finished, never
overwritten; see :mod:`..training.engine.named_run`.

    job, output = Job("pictures/vase", "<vase>"), Output(Path("adapters"), "vase")
    done = train_adapter(pipe, job, TrainConfig(), output)

The pipeline is afterwards as it was.

Shapes: :mod:`.dataset`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..adapter.adapter import Adapter, Provenance
from ..adapter.fingerprint import digest_of, fingerprint
from ..attach.attaching import Attachment, attach
from ..attach.targets import find_targets
from ..maths.svd_cache import SVDCache
from ..training.config.config import TrainConfig
from ..training.data.folder import Order
from ..training.engine.checks import fitting
from ..training.engine.columns import basis_source
from ..training.engine.loop import Setup, evaluation_loss
from ..training.engine.named_run import Output, Prepared, Reserve, Trained, named_run, new_adapter
from ..training.runs.place import Place
from .applying import generate
from .dataset import Captions, Dataset, encode_dataset, find_dataset, latent_factor, masks_of
from .job import Job
from .loading import diffusion_of, family_of, parts_of
from .tokens import TokenRows, initial_rows


def train_adapter(pipe: Any, job: Job, config: TrainConfig, output: Output) -> Trained:
    """Train the job on the pipeline, or go on with it, or return what it has made.

    Raises SpectralAdapterError before the first step for everything that can be known then, and as
    :func:`..training.engine.named_run.named_run` later.
    """
    data = find_dataset(pipe, job)
    weights, notes = target_weights(pipe, job)
    provenance = Provenance(family=family_of(pipe), base=fingerprint(weights), trigger_words=(job.token,))
    settings = {"job": job.settings(), "pictures": data.digest, "model": digest_of(provenance.base)}

    def begin(name: str, reserve: Reserve) -> tuple[Adapter, list[str]]:
        basis_of = partial(basis_source, cache=SVDCache(output.caches))
        return new_adapter(job, weights, replace(provenance, name=name), config.seed, reserve, basis_of)

    @contextmanager
    def prepare(begun: Adapter, place: Place) -> Iterator[Prepared]:
        with _attached(pipe, job, begun) as (attachments, words):
            yield Prepared(
                begun,
                _setup(pipe, job, config, data, output.caches if job.cache else None, attachments, words),
                config,
                job.method,
                record={
                    **job.settings(),
                    "resolution": f"{job.size[0]}x{job.size[1]}",
                    "images": data.concept_count,
                },
                finish=lambda adapter: replace(adapter, tokens=words.values()),
                sampler=_sampler(pipe, job) if output.sample_every else None,
            )

    return named_run(output, config, settings, begin, prepare, [*data.notes, *notes])


def evaluate(pipe: Any, job: Job, adapter: Adapter) -> float:
    """The loss over the job's pictures at fixed noise levels with fixed noise; of what a run began with, too,
    whose word is new."""
    data = find_dataset(pipe, job)
    with _attached(pipe, job, adapter) as (attachments, words), ExitStack() as around:
        for attachment in attachments:
            around.enter_context(attachment.gates.inference())
        return evaluation_loss(_setup(pipe, job, TrainConfig(), data, None, attachments, words))


def target_weights(pipe: Any, job: Job) -> tuple[dict[str, Tensor], list[str]]:
    """Layer name -> weight of every layer that the job trains, and what to say about layers too small for
    it."""
    parts = parts_of(pipe)
    weights, _ = find_targets(parts["unet"], "unet", job.targets)
    for part in ("text_encoder", "text_encoder_2"):
        if job.text_targets and part in parts:
            weights |= find_targets(parts[part], part, job.text_targets)[0]
    return fitting(weights, job.method_config(job.columns or tuple(range(job.rank))))


@contextmanager
def _attached(pipe: Any, job: Job, adapter: Adapter) -> Iterator[tuple[list[Attachment], TokenRows]]:
    """The adapter in training on every part that it changes, and the new words."""
    with ExitStack() as undo:
        new = {job.token: initial_rows(pipe, job.init_words)} if job.init_words else {}
        words = undo.enter_context(TokenRows(pipe, adapter.tokens or new, trainable=True))
        modules = parts_of(pipe)
        attachments = [
            undo.enter_context(attach(modules[part], adapter, part=part, trainable=True))
            for part in adapter.parts
        ]
        yield attachments, words


def _setup(
    pipe: Any,
    job: Job,
    config: TrainConfig,
    data: Dataset,
    cache: Path | None,
    attachments: Sequence[Attachment],
    words: TokenRows,
) -> Setup:
    latents = encode_dataset(pipe, data, cache)
    prior = None
    if job.prior_images:
        prior = Order(data.shown(prior=True), config.batch_size, config.seed + 1, data.sizes)
    captions = Captions(pipe, keep=not (job.init_words or job.text_targets), cache=cache)
    modules = parts_of(pipe)
    return Setup(
        denoiser=denoiser_of(pipe, data, captions),
        latents=latents,
        order=Order(data.shown(prior=False), config.batch_size, config.seed, data.sizes),
        diffusion=diffusion_of(pipe),
        attachments=attachments,
        tokens=[p for rows in words.parameters.values() for p in rows.values()],
        masks=masks_of(data, latents),
        prior=prior,
        roots=[modules["unet"]],
        held_out=data.held_out,
        preserved=data.preserved,
    )


def denoiser_of(
    pipe: Any, data: Dataset, captions: Captions
) -> Callable[[Tensor, Tensor, Sequence[int | None]], Tensor]:
    """The pipeline's denoiser as a callable of (noisy, timesteps, examples); None is an empty caption."""
    factor = latent_factor(pipe)

    def denoise(noisy: Tensor, timesteps: Tensor, indices: Sequence[int | None]) -> Tensor:
        texts = [data.caption(i) for i in indices]
        size = (noisy.shape[-1] * factor, noisy.shape[-2] * factor)
        conditioning = captions.encode(texts, size)
        prediction: Tensor = pipe.unet(noisy.to(pipe.unet.dtype), timesteps, **conditioning).sample
        return prediction

    return denoise


def _sampler(pipe: Any, job: Job) -> Callable[[int], Sequence[Image.Image]]:
    """The same prompts and seeds every time."""
    prompts = job.sample_prompts or (f"a picture of {job.token}",)

    def draw(step: int) -> Sequence[Image.Image]:
        return generate(pipe, prompts, list(range(len(prompts))), size=job.size, batch_size=1)

    return draw
