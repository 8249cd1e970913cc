"""What the layers of several adapters see while a pipeline draws each concept, for fusions that keep them.

    found = concept_statistics(pipe, adapters, [("a <cat>",), ("a <dog>",)])
    fuse(adapters, "closed-form", statistics=found)

Every concept is drawn alone, with its own adapter at strength 1 (or −1), by a few steps of the pipeline's
sampler; pictures are not decoded. Strengths and schedules do not matter, so the same statistics serve any
weights of a later fusion. A second look, under what was fused first, keeps more:

    done = fuse_in_rounds(
        lambda under: concept_statistics(pipe, adapters, prompts, under=under),
        lambda seen: fuse(adapters, "closed-form", statistics=seen),
    )

Shapes: those of :mod:`..statistics.moments`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..errors import SpectralAdapterError
from ..statistics.collect import LIMIT_BYTES, collect, exact_bytes, modules_of
from ..statistics.collect import Space as WhichSpace
from ..statistics.moments import Statistics
from ..words import chosen
from .applying import apply
from .loading import parts_of

Space = Literal["auto", "exact", "rank"]
SPACES: tuple[Space, ...] = get_args(Space)


@dataclass(frozen=True)
class Looking:
    """How to look. size: (width, height) in pixels, None for the pipeline's own. space: ``exact``, ``rank``
    (see :mod:`..statistics.collect`), or ``auto`` for exact where it fits into ``limit_bytes``, with those of
    an earlier look beside it where there will be several ``rounds``."""

    steps: int = 4
    guidance: float = 4.0
    size: tuple[int, int] | None = None
    seed: int = 0
    space: Space = "auto"
    limit_bytes: int = LIMIT_BYTES
    rounds: int = 1

    def __post_init__(self) -> None:
        chosen(self.space, SPACES, "statistics space")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise SpectralAdapterError(f"{self.steps!r} steps: expected a whole number of at least 1")


def concept_statistics(
    pipe: Any,
    adapters: Sequence[Adapter],
    prompts: Sequence[Sequence[str]],
    looking: Looking | None = None,
    signs: Sequence[int] | None = None,
    on_concept: Callable[[int], object] | None = None,
    under: Adapter | None = None,
) -> list[Mapping[str, Statistics]]:
    """Layer name -> statistics for every adapter; empty for one of sign 0.

    prompts: of each concept, each drawn once. signs: −1, 0 or 1 of each adapter's strength. on_concept gets
    the number of each concept just drawn. under: all of them are drawn with this adapter instead, as it is.
    Raises SpectralAdapterError where an adapter does not fit.
    """
    looking, signs = looking or Looking(), signs or [1] * len(adapters)
    if not len(prompts) == len(signs) == len(adapters):
        raise SpectralAdapterError(
            f"prompts of {len(prompts)} concepts and {len(signs)} signs for {len(adapters)} adapters: "
            "expected one for each"
        )
    modules = _modules(pipe, adapters)
    space = _space(looking, modules, adapters, sum(map(bool, signs)))
    found: list[Mapping[str, Statistics]] = []
    for place, (adapter, texts, sign) in enumerate(zip(adapters, prompts, signs, strict=True)):
        if not sign:
            found.append({})
            continue
        alone = replace(adapter, strength=float(sign), layer_strengths=(), schedule=None)
        device = torch.device("cpu")
        with apply(pipe, under or alone), collect(modules, adapters, space, device=device) as seen:
            _draw(pipe, texts, looking)
        found.append(seen.statistics())
        if on_concept is not None:
            on_concept(place)
    return found


def _modules(pipe: Any, adapters: Sequence[Adapter]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for part, root in parts_of(pipe).items():
        found |= modules_of(root, adapters, part)
    return found


def _space(
    looking: Looking, modules: Mapping[str, nn.Module], adapters: Sequence[Adapter], concepts: int
) -> WhichSpace:
    if looking.space != "auto":
        return looking.space
    widths = {name: a.layers[name].shape.fan_in for a in adapters for name in modules if name in a.layers}
    kept = concepts * min(looking.rounds, 2)
    return "exact" if exact_bytes(modules, widths) * kept <= looking.limit_bytes else "rank"


@torch.inference_mode()
def _draw(pipe: Any, prompts: Sequence[str], looking: Looking) -> None:
    sides = {} if looking.size is None else {"width": looking.size[0], "height": looking.size[1]}
    for number, prompt in enumerate(prompts):
        pipe(
            prompt,
            num_inference_steps=looking.steps,
            guidance_scale=looking.guidance,
            generator=torch.Generator("cpu").manual_seed(looking.seed + number),
            output_type="latent",
            **sides,
        )
