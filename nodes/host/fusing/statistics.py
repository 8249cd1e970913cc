"""What the layers of several adapters see in the host's model, for fusions that keep each concept.

For every concept its own adapter is put on clones of MODEL and CLIP, its prompts are encoded and denoised for
a few steps by the host's sampler, and hooks sum up what the layers get. A later look does the same under what
was fused so far. The model that came in is not changed. The last first looks at a model are kept, so that for
other weights, ranks and methods only the later ones are drawn again.

Shapes: those of :mod:`spectral_core.statistics.moments`; the latent (1, C, h, w), with one frame where the
model wants frames.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.attach.targets import layer_problem
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.names.layer_name import LayerName
from ....spectral_core.statistics.collect import LIMIT_BYTES, collect, exact_bytes
from ....spectral_core.statistics.moments import Statistics
from ..apply import adapters as applying
from ..apply import gate_records as records
from ..model import places as keys
from ..training.start import family_of
from . import drawing

_CELLS = {"mini": 16, "sdxl": 64}  # side of the latent; half of what the families are made for, but the demo
_OTHER_CELLS = 48
_KEPT = 2  # collections per model
KEPT = "nothing that matters has changed, so nothing was drawn again; "
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Request:
    """How to look: the MODEL, and prompts for a CLIP or encoded ones, one entry for each adapter.

    signs: −1, 0 or 1, the sign of every adapter's strength; 0 is left out. latent: its size is used. space:
    ``exact``, ``rank``, or ``auto`` for exact where that fits into memory, together with an earlier look's
    where ``rounds`` > 1.
    """

    model: Any
    clip: Any
    prompts: Sequence[Sequence[str]]
    conditioning: Sequence[Any]
    signs: Sequence[int]
    latent: Any = None
    steps: int = 4
    cfg: float = 4.0
    seed: int = 0
    space: str = "auto"
    rounds: int = 1


@dataclass(frozen=True)
class Collected:
    """Statistics by layer for every adapter (empty for one that is left out), lines for the report."""

    statistics: tuple[Mapping[str, Statistics], ...]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    key: str
    clip: Any  # a weak reference
    found: Collected


# For the whole process on purpose: a new weight executes the node again, and must not sample again.
_COLLECTED: WeakKeyDictionary[Any, list[_Entry]] = WeakKeyDictionary()


def collected(adapters: Sequence[Adapter], request: Request, under: Adapter | None = None) -> Collected:
    """The statistics of all adapters, kept ones where nothing that matters has changed.

    under: every concept is drawn with this adapter, as it is, instead of its own, and nothing is kept.
    Raises SpectralAdapterError for an adapter of another model, and the host's interrupt.
    """
    if under is not None:
        return _collect(adapters, request, under)
    kept = _COLLECTED.setdefault(request.model, [])
    key = _key(adapters, request)
    for entry in kept:
        if entry.key == key and entry.clip() is request.clip:
            return replace(entry.found, lines=(f"{KEPT}{entry.found.lines[0]}", *entry.found.lines[1:]))
    found = _collect(adapters, request)
    clip = (lambda: None) if request.clip is None else ref(request.clip)
    _COLLECTED[request.model] = [_Entry(key, clip, found), *kept[: _KEPT - 1]]
    return found


def _key(adapters: Sequence[Adapter], request: Request) -> str:
    """A word for everything that the statistics depend on, but for the objects MODEL and CLIP."""
    digest = hashlib.sha256()
    for adapter in adapters:
        digest.update(records.key_of(adapter).encode())
        for token, parts in sorted(adapter.tokens.items()):
            digest.update(repr(token).encode())
            for part, rows in sorted(parts.items()):
                digest.update(part.encode() + rows.detach().cpu().float().numpy().tobytes())
    for entry in request.conditioning:
        digest.update(entry[0].detach().cpu().float().numpy().tobytes())
    patched = [str(p.patches_uuid) for p in (request.model, getattr(request.clip, "patcher", None)) if p]
    shape = None if request.latent is None else list(request.latent["samples"].shape)
    settings = (request.prompts, tuple(request.signs), shape, request.steps, request.cfg, request.seed)
    digest.update(repr((settings, request.space, request.rounds > 1, patched)).encode())
    return digest.hexdigest()


def _collect(adapters: Sequence[Adapter], request: Request, under: Adapter | None = None) -> Collected:
    modules, skipped = _modules(adapters, request)
    space, why = _space(adapters, modules, request)
    latent = empty_latent(request.model, request.latent)
    runs = [max(len(p), 1) if sign else 0 for p, sign in zip(request.prompts, request.signs, strict=True)]
    bar = comfy.utils.ProgressBar(max(sum(runs) * request.steps, 1))
    started = time.monotonic()
    # not the adapters' CLIP, and outside of the hooks: nothing of a concept is in it
    guided = request.clip is not None and request.cfg != 1.0
    negative = encoded(request.clip, "") if guided else None
    found: list[Mapping[str, Statistics]] = []
    for place, sign in enumerate(request.signs):
        if not sign:
            found.append({})
            continue
        alone = replace(adapters[place], strength=float(sign), layer_strengths=(), schedule=None)
        run = _Run(under or alone, place, request, latent, negative, bar.update)
        with collect(modules, adapters, space, device=_CPU) as seen, _without_compiler():
            run.go()
        found.append(seen.statistics())
    seconds, size = time.monotonic() - started, " × ".join(map(str, latent.shape[2:]))
    what = "statistics" if under is None else "statistics under what was fused"
    lines = [
        f"{what}: {sum(runs)} runs of {request.steps} steps at {size} latent cells, {seconds:.1f} s, "
        f"{_size(found) / 2**20:.0f} MiB, {why}"
    ]
    never = [n for n in modules if not any(n in statistics for statistics in found)]
    if never:
        lines.append(f"statistics: {len(never)} layers did not run, such as {never[0]}")
    if skipped:
        lines.append(
            f"statistics: {len(skipped)} layers cannot be watched, such as {skipped[0]}, and are averaged"
        )
    return Collected(tuple(found), tuple(lines))


def _modules(adapters: Sequence[Adapter], request: Request) -> tuple[dict[str, nn.Module], list[str]]:
    """Layer name -> the module that gets its input, and the layers that have none."""
    clip = None if request.conditioning else request.clip
    modules: dict[str, nn.Module] = {}
    skipped: dict[str, None] = {}
    for adapter in adapters:
        places = keys.place(adapter, request.model, clip)
        owners = [(request.model, place) for place in places.model]
        owners += [(clip.patcher, place) for place in places.clip] if clip is not None else []
        for patcher, place in owners:
            module = keys.module_at(patcher.model, place.module_path)
            is_slice_of_inputs = place.offset is not None and place.offset[0] != 0
            if LayerName.parse(place.name).vector is not None:
                continue  # a bias or a norm has no input to speak of
            if module is None or is_slice_of_inputs or place.function is not None or layer_problem(module):
                skipped[place.name] = None
            else:
                modules[place.name] = module
    return modules, list(skipped)


def _space(
    adapters: Sequence[Adapter], modules: Mapping[str, nn.Module], request: Request
) -> tuple[str, str]:
    """(exact or rank, a word for the report)."""
    if request.space == "rank":
        return "rank", "in the adapters' own rows"
    widths = {n: a.layers[n].shape.fan_in for a in adapters for n in modules if n in a.layers}
    needed = exact_bytes(modules, widths) * sum(map(bool, request.signs)) * min(request.rounds, 2)
    free = comfy.model_management.get_free_memory(_CPU)
    if request.space == "auto" and needed > min(LIMIT_BYTES, free // 2):
        return "rank", f"in the adapters' own rows: in full they would need {needed / 2**30:.1f} GiB"
    return "exact", "in full"


def empty_latent(model: Any, given: Any) -> Tensor:
    """Zeros (1, C, h, w) of the connected LATENT's size, else of a size that suits the model."""
    form = model.get_model_object("latent_format")
    channels = form.latent_channels
    if given is not None:
        shape = [1, channels, *given["samples"].shape[2:]]
    else:
        side = _CELLS.get(family_of(model), _OTHER_CELLS)
        shape = [1, channels, side, side]
    if getattr(form, "latent_dimensions", 2) == 3 and len(shape) == 4:
        shape.insert(2, 1)
    return torch.zeros(shape)


@dataclass(frozen=True)
class _Run:
    """One concept: an adapter on clones, the concept's prompts, denoised one after the other."""

    adapter: Adapter
    place: int
    request: Request
    latent: Tensor
    negative: Any
    tick: Callable[[int], None]

    def go(self) -> None:
        given = self.request
        clip = None if given.conditioning else given.clip
        applied = applying.apply(self.adapter, given.model, clip, 1.0, 1.0)
        negative = self.negative
        if given.conditioning:
            positives = [[given.conditioning[self.place]]]
        else:
            positives = [encoded(applied.clip, prompt) for prompt in given.prompts[self.place]]
        way = drawing.Way(given.steps, given.cfg)
        for number, positive in enumerate(positives):
            seeds = [given.seed + number]
            drawing.draw(applied.model, positive, negative, self.latent, seeds, way, self.tick)


def encoded(clip: Any, text: str) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Compiled code calls no hooks; where torch can, such models run as written inside the block."""
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None or "torch._dynamo" not in sys.modules:  # its import takes seconds
        yield
        return
    with stance("force_eager"):
        yield


def _size(found: Sequence[Mapping[str, Statistics]]) -> int:
    tensors = {id(s.second_moment): s.second_moment for by_layer in found for s in by_layer.values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def conditionings(value: Any, adapters: Sequence[Adapter]) -> list[Any]:
    """The entries of a CONDITIONING, one for each adapter; none where nothing is connected."""
    if value is None:
        return []
    entries = list(value)
    if len(entries) != len(adapters):
        raise SpectralAdapterError(
            f"conditioning holds {len(entries)} prompts for {len(adapters)} adapters: expected one for each, "
            "in their order (Conditioning (Combine) joins them), or connect clip instead"
        )
    return entries
