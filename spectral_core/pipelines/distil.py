"""Distil several adapters into one on a diffusers pipeline; see :mod:`..training.objectives.distillation`.

    fused = fuse(adapters, "closed-form", statistics=concept_statistics(pipe, adapters, prompts)).adapter
    done = distil(pipe, fused, adapters, prompts, DistilJob(), DISTIL, Output(Path("adapters"), "both"))
    with apply(pipe, done.adapter):
        ...

The denoiser's layers learn; those of text encoders stay as they were fused.

Shapes: sizes are (width, height) in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import digest_of, fingerprint
from ..attach.attaching import attach
from ..attach.targets import find_targets
from ..errors import SpectralAdapterError
from ..statistics.prompts import PRESERVE, without_concepts
from ..training.config.adapter import SampleSettings
from ..training.config.config import TrainConfig
from ..training.config.setting import check_settings
from ..training.data.order import Order
from ..training.engine.loop import Setup
from ..training.engine.named_run import Output, Prepared, Reserve, Trained, named_run
from ..training.objectives.distillation import (
    BASE,
    DistilDenoiser,
    DistilExample,
    drawn_as,
    examples,
    settled,
    student_of,
)
from ..training.objectives.towards_prediction import ResidualNoise
from ..training.runs.place import Place
from .applying import apply
from .conditioning import Conditioning, encode, joined_rows
from .loading import diffusion_of, native_size

_DRAWN_TOGETHER = 8


@dataclass(frozen=True)
class DistilJob(SampleSettings):
    """The samples are drawn of every concept with its own adapter, and as many of ``preserve``: prompts
    without any concept under which the model shall draw what it draws alone (those with a concept's word in
    them are left out); empty: it may change there."""

    preserve: tuple[str, ...] = PRESERVE

    def __post_init__(self) -> None:
        object.__setattr__(self, "preserve", tuple(p.strip() for p in self.preserve if p.strip()))
        check_settings(self)

    def settings(self) -> dict[str, Any]:
        """What the result depends on, JSON-able."""
        return asdict(self) | {
            "preserve": list(self.preserve),
            "size": None if self.size is None else list(self.size),
        }


def distil(
    pipe: Any,
    fused: Adapter | Callable[[], Adapter],
    adapters: Sequence[Adapter],
    prompts: Sequence[Sequence[str]],
    job: DistilJob,
    config: TrainConfig,
    output: Output,
    settings: Mapping[str, Any] | None = None,
    on_sample: Callable[[int], object] | None = None,
) -> Trained:
    """Train ``fused`` to do what each of ``adapters`` (at its strength) does under its own prompts; or go on
    with it, or return what the run has made. The pipeline is afterwards as it was.

    fused: or what makes it, which a run needs only once. An adapter of strength 0 is left out. config: a
    learning rate of 0 is chosen from the size of the parameters. settings: by which the run is known besides
    these; ``model`` is told by its weights where it is not among them. on_sample: gets the number of samples
    just drawn.

    Raises SpectralAdapterError as :func:`..training.engine.named_run.named_run`.
    """
    if len(prompts) != len(adapters):
        raise SpectralAdapterError(f"prompts of {len(prompts)} concepts for {len(adapters)} adapters")
    pairs = [(a, tuple(p)) for a, p in zip(adapters, prompts, strict=True) if a.strength]
    if not pairs or any(not p for _, p in pairs):
        raise SpectralAdapterError("every adapter needs a prompt that shows its concept")
    taught = [a for a, _ in pairs]
    preserve, notes = without_concepts(job.preserve, taught, [p for _, p in pairs])
    dropout = config.caption_dropout if job.guidance > 1 else 0.0
    shown, places = examples([p for _, p in pairs], preserve, job.samples, dropout)
    known = {
        "distil": job.settings(),
        "adapters": [[a.content_hash, a.strength] for a in adapters],
        "fused": fused.content_hash if isinstance(fused, Adapter) else None,
        "prompts": [list(p) for p in prompts],
        **(settings or {}),
    }
    if "model" not in known:
        known["model"] = digest_of(fingerprint(find_targets(pipe.unet, "unet", "attention")[0]))

    def begin(name: str, _: Reserve) -> tuple[Adapter, list[str]]:
        student = student_of(fused if isinstance(fused, Adapter) else fused())
        if "unet" not in student.parts:
            raise SpectralAdapterError(
                "the fused adapter changes no layer of the denoiser: nothing to distil"
            )
        return student.with_provenance(name=name), []

    @contextmanager
    def prepare(begun: Adapter, place: Place) -> Iterator[Prepared]:
        settled_config = settled(config, begun, ["unet"])
        drawn = _samples(pipe, job, taught, shown, places, config.seed, on_sample)
        texts = _texts(pipe, job, taught, begun, shown)
        noise = ResidualNoise(diffusion_of(pipe))

        def predict(noisy: Tensor, timesteps: Tensor, rows: Sequence[int], as_teacher: bool) -> Tensor:
            said = [shown[i] for i in rows]
            found = joined_rows([texts[e.concept if as_teacher else None, e.prompt] for e in said])
            prediction: Tensor = pipe.unet(noisy.to(pipe.unet.dtype), timesteps, **found).sample
            return prediction

        with ExitStack() as undo:
            teachers = [
                [undo.enter_context(attach(pipe.unet, a, part="unet"))] if "unet" in a.parts else []
                for a in taught
            ]
            learner = undo.enter_context(attach(pipe.unet, begun, part="unet", trainable=True))
            setup = Setup(
                denoiser=DistilDenoiser(predict, [learner], teachers, noise, shown),
                latents=[drawn[number] for number in places],
                order=Order(shown, config.batch_size, config.seed),
                diffusion=noise,
                attachments=[learner],
                roots=[pipe.unet],
            )
            yield Prepared(begun, setup, settled_config, "lora", record={"distilled": job.settings()})

    return named_run(output, config, known, begin, prepare, notes)


@torch.no_grad()
def _samples(
    pipe: Any,
    job: DistilJob,
    taught: Sequence[Adapter],
    shown: Sequence[DistilExample],
    places: Sequence[int],
    seed: int,
    on_sample: Callable[[int], object] | None,
) -> list[Tensor]:
    """The latents (C, h, w) of every sample, each drawn with its concept's own adapter, or with none."""
    sides = {} if job.size is None else {"width": job.size[0], "height": job.size[1]}
    said = drawn_as(shown, places)
    found: dict[int, Tensor] = {}
    for concept in dict.fromkeys(e.concept for e in said.values()):
        numbers = [number for number, e in said.items() if e.concept == concept]
        with apply(pipe, *([] if concept == BASE else [taught[concept]])):
            for start in range(0, len(numbers), _DRAWN_TOGETHER):
                chunk = numbers[start : start + _DRAWN_TOGETHER]
                out = pipe(
                    [said[n].prompt for n in chunk],
                    num_inference_steps=job.sample_steps,
                    guidance_scale=job.guidance,
                    generator=[torch.Generator("cpu").manual_seed(seed + n) for n in chunk],
                    output_type="latent",
                    **sides,
                )
                found |= dict(zip(chunk, out.images.float(), strict=True))
                if on_sample is not None:
                    on_sample(len(chunk))
    return [found[number] for number in range(len(found))]


@torch.no_grad()
def _texts(
    pipe: Any,
    job: DistilJob,
    taught: Sequence[Adapter],
    student: Adapter,
    shown: Sequence[DistilExample],
) -> dict[tuple[int | None, str], Conditioning]:
    """(concept, or None for the student, prompt) -> what the denoiser is told, under that adapter's text
    encoder and words."""
    size = job.size or native_size(pipe)
    found: dict[tuple[int | None, str], Conditioning] = {}
    for concept in (None, *dict.fromkeys(e.concept for e in shown)):
        adapter = student if concept is None else None if concept == BASE else taught[concept]
        said = [e.prompt for e in shown if concept is None or e.concept == concept]
        with apply(pipe, *([] if adapter is None else [adapter])):
            found |= {(concept, text): encode(pipe, [text], size) for text in dict.fromkeys(said)}
    return found
