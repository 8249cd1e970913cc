"""What a training in the host is shown: latents with conditionings from other nodes, or a folder of pictures.

Shapes: latents (C, H, W) or (C, T, H, W) per example, as the model wants them, float32; masks (1, H, W).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.training.data import buckets
from ....spectral_core.training.data.folder import (
    PLACEHOLDER,
    Example,
    find_examples,
    load_mask,
    load_picture,
    picture_size,
)
from ....spectral_core.training.engine import checks
from ....spectral_core.training.objectives.preservation import Preserved, Said
from ..files import names
from .identity import content_digest

NO_FOLDER = "none"
SAMPLE = -1  # the index of what samples show, where that is no example's
_DEEPEST = 4  # levels of folders below the input folder that are offered


@dataclass(frozen=True)
class Repeats:
    """How often an epoch shows an example."""

    repeats: int = 1


@dataclass
class Data:
    """Latents, their [tensor, options] conditionings (None: the empty caption), masks, repeats; what is odd.

    digest: changes with everything that the training sees. groups: a batch holds examples of one group.
    captions: in place of conditionings where the text encoders train. prior_from: the first of the examples
    that only keep the model as it is, which come last; None without any. held_out: the examples that judge
    the training. preserved: what the model is told where it shall stay as it is.
    """

    latents: list[Tensor]
    entries: dict[int | None, Any]
    digest: str
    masks: list[Tensor | None] | None = None
    repeats: list[Repeats] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    captions: dict[int | None, str] = field(default_factory=dict)
    prior_from: int | None = None
    held_out: tuple[int, ...] = ()
    preserved: Preserved | None = None

    @property
    def concept_count(self) -> int:
        return len(self.latents) if self.prior_from is None else self.prior_from

    def shown(self, prior: bool) -> list[Repeats]:
        """The repeats of the concept's examples that train or of the prior ones, none of the others."""
        return [
            kept if (i >= self.concept_count) == prior and i not in self.held_out else Repeats(0)
            for i, kept in enumerate(self.repeats)
        ]

    def with_prior(self, prior: Data) -> Data:
        """With the examples of another behind these, as prior ones."""
        return replace(self.followed_by(prior), prior_from=len(self.latents))

    def judged_by(self, others: Data) -> Data:
        """With the examples of another behind these, held out."""
        count = len(self.latents)
        return replace(self.followed_by(others), held_out=tuple(range(count, count + len(others.latents))))

    def followed_by(self, others: Data) -> Data:
        """With the examples of another behind these."""
        count = len(self.latents)
        masks = None
        if self.masks is not None or others.masks is not None:
            masks = [m for d in (self, others) for m in d.masks or [None] * len(d.latents)]

        def behind(own: dict[int | None, Any], more: dict[int | None, Any]) -> dict[int | None, Any]:
            return own | {i + count: value for i, value in more.items() if i is not None}

        return replace(
            self,
            latents=[*self.latents, *others.latents],
            entries=behind(self.entries, others.entries),
            masks=masks,
            repeats=[*self.repeats, *others.repeats],
            notes=[*self.notes, *others.notes],
            captions=behind(self.captions, others.captions),
        )

    @property
    def groups(self) -> list[tuple[int, ...]]:
        return [tuple(latent.shape) for latent in self.latents]

    @property
    def can_drop(self) -> bool:
        return None in self.entries or None in self.captions


def from_nodes(model: Any, latents: Sequence[Any], conditionings: Sequence[Any], clip: Any | None) -> Data:
    """LATENTs and CONDITIONINGs, single ones with a batch or the lists of the host's dataset nodes.

    Raises SpectralAdapterError for other numbers of both, other channels than the model's, and anything else.
    """
    rows: list[Tensor] = []
    for i, latent in enumerate(latents):
        samples = latent.get("samples") if isinstance(latent, Mapping) else None
        if getattr(samples, "is_nested", False):
            raise SpectralAdapterError(
                f"latents, number {i + 1}: holds several latents in one, such as a video and its sound; "
                "models of that kind do not train here, and adapters for them are applied only"
            )
        if not isinstance(samples, Tensor):
            raise SpectralAdapterError(f"latents, number {i + 1}: expected a LATENT; connect VAE Encode")
        rows += [row.float().cpu().clone() for row in samples]
    entries = [row for c in conditionings for entry in _entries(c) for row in _split(entry)]
    order = checks.matched(len(rows), len(entries))
    found: dict[int | None, Any] = {i: entries[k] for i, k in enumerate(order)}
    digest = content_digest([rows, [entries[k] for k in order]])
    if clip is not None:
        found[None] = encode_caption(clip, "")
    return Data([taken_in(model, row) for row in rows], found, digest, repeats=[Repeats()] * len(rows))


def _entries(conditioning: Any) -> list[Any]:
    is_list = isinstance(conditioning, list | tuple)
    if not is_list or not all(isinstance(e, list | tuple) and len(e) == 2 for e in conditioning):
        raise SpectralAdapterError("conditioning: expected a CONDITIONING; connect CLIP Text Encode")
    return list(conditioning)


def _split(entry: Any) -> list[Any]:
    """One conditioning per row of a batch of them."""
    states, options = entry
    count = states.shape[0] if isinstance(states, Tensor) else 1
    if count == 1:
        return [entry]

    def row(value: Any, i: int) -> Any:
        return value[i : i + 1] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value

    return [[row(states, i), {k: row(v, i) for k, v in options.items()}] for i in range(count)]


def taken_in(model: Any, latent: Tensor) -> Tensor:
    """As the model wants it; the host's own scaling and shift."""
    wanted = model.get_model_object("latent_format")
    scaled = _processed(wanted, latent)
    if scaled is None or scaled.shape[0] != wanted.latent_channels:
        raise SpectralAdapterError(
            f"latents of {latent.shape[0]} channels: this model's have {wanted.latent_channels}; encode the "
            "pictures with the VAE that belongs to the model"
        )
    if not bool(torch.isfinite(latent).all()):
        raise SpectralAdapterError("latents with values that are not finite: the VAE or a picture is damaged")
    return scaled


def _processed(wanted: Any, latent: Tensor) -> Tensor | None:
    """By the host's own scaling, which may fold frames into channels; None for channels that it cannot."""
    with torch.inference_mode(False), torch.no_grad():
        try:
            scaled: Tensor = wanted.process_in(latent.clone()[None])[0]
        except RuntimeError:
            return None
        return scaled.clone()


# --- folders ------------------------------------------------------------------------------------------


def input_folder() -> Path | None:
    """The host's input folder; None outside the host."""
    host = sys.modules.get("folder_paths")
    return None if host is None else Path(host.get_input_directory())


def folders() -> list[str]:
    """Folders below the host's input folder, with ``/``, after the choice of none."""
    root = input_folder()
    found = []
    if root is not None and root.is_dir():
        for place, below, _ in os.walk(root):
            relative = Path(place).relative_to(root)
            below[:] = sorted(name for name in below if not name.startswith("."))
            if len(relative.parts) >= _DEEPEST:
                below.clear()
            if relative.parts:
                found.append(relative.as_posix())
    return [NO_FOLDER, *sorted(found)]


def folder_named(name: str) -> Path:
    """The folder of a name; SpectralAdapterError for one outside the input folder, or that is not there."""
    root = input_folder()
    parts = names.safe_parts(name, "image folder")
    if root is None or not (path := root.joinpath(*parts)).is_dir():
        raise SpectralAdapterError(
            f"image folder {name!r}: is not in ComfyUI's input folder; put the pictures with their captions "
            "into a folder there, refresh the page (key r) and choose it"
        )
    return path


def state_of_folder(name: str) -> str:
    """The same until a file in the folder changes."""
    folder = folder_named(name)
    state = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            state.append((path.relative_to(folder).as_posix(), stat.st_mtime_ns, stat.st_size))
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


@dataclass(frozen=True)
class Pictures:
    """Pictures of a folder with captions and sizes in pixels: looked at, not encoded yet."""

    examples: tuple[Example, ...]
    sizes: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(repr(self.sizes).encode())
        for example in self.examples:
            digest.update(repr((example.caption, example.repeats)).encode())
            for path in filter(None, (example.path, example.mask)):
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Framing:
    """Pictures as large as ``resolution`` squared, which is a multiple of ``step``, the pixels of a latent
    cell; all square, or each in its proportions."""

    resolution: int
    keep_proportions: bool
    step: int

    def __post_init__(self) -> None:
        if self.resolution % self.step:
            raise SpectralAdapterError(
                f"resolution {self.resolution}: expected a multiple of {self.step} for this VAE"
            )

    def sizes(self, examples: Sequence[Example]) -> list[tuple[int, int]]:
        """The size of each, for which all of them are opened, with their masks."""
        shown = [picture_size(e.path) for e in examples]
        for example in examples:
            if example.mask is not None:
                picture_size(example.mask)
        size = (self.resolution, self.resolution)
        fits = self.keep_proportions
        return buckets.assign_buckets(shown, size, max(self.step, 8)) if fits else [size] * len(shown)


def look_at(name: str, trigger_word: str, framing: Framing) -> Pictures:
    """The folder's pictures, every one opened once.

    Raises SpectralAdapterError for an empty folder, a broken picture, and no captions at all.
    """
    examples = find_examples(folder_named(name), trigger_word.strip())
    if not trigger_word.strip() and not any(e.captioned for e in examples):
        raise SpectralAdapterError(
            f"image folder {name!r}: none of its {len(examples)} pictures has a caption; put a text file of "
            "the same name beside each (cat.jpg, cat.txt), or set trigger_word"
        )
    return Pictures(tuple(examples), tuple(framing.sizes(examples)), tuple(checks.caption_warnings(examples)))


def look_at_prior(name: str, init_words: str, framing: Framing) -> Pictures:
    """Pictures of the concept's class; those without a caption get ``a picture of <init_words>``, or an empty
    one."""
    plain = f"a picture of {init_words.strip()}" if init_words.strip() else ""
    examples = [e if e.captioned else replace(e, caption=plain) for e in find_examples(folder_named(name))]
    return Pictures(tuple(examples), tuple(framing.sizes(examples)), ())


def from_pictures(model: Any, pictures: Pictures, vae: Any, clip: Any, interrupted: Any) -> Data:
    """Encoded by the host's VAE and CLIP; ``interrupted`` is called before each and may raise. Without a CLIP
    the captions stay words."""
    latents, masks = [], []
    captions: dict[int | None, str] = {None: ""}
    for i, (example, (width, height)) in enumerate(zip(pictures.examples, pictures.sizes, strict=True)):
        interrupted()
        pixels = (load_picture(example.path, width, height).permute(1, 2, 0)[None] + 1) / 2
        with torch.inference_mode():
            latent = vae.encode(pixels)[0].float().cpu()
        latents.append(taken_in(model, latent))
        mask = None
        if example.mask is not None:
            mask = load_mask(example.mask, width, height)[None]
            mask = F.interpolate(mask, latents[-1].shape[-2:], mode="area")[0]
        masks.append(mask)
        captions[i] = example.caption
    repeats = [Repeats(e.repeats) for e in pictures.examples]
    has_masks = any(mask is not None for mask in masks)
    data = Data(latents, {}, pictures.digest, masks if has_masks else None, repeats, list(pictures.notes))
    if clip is None:
        data.captions = captions
    else:
        known = {text: encode_caption(clip, text) for text in dict.fromkeys(captions.values())}
        data.entries = {i: known[text] for i, text in captions.items()}
    return data


def add_sample(data: Data, prompt: str, trigger_word: str, clip: Any) -> int:
    """The words that samples show, among the data's conditionings or captions; their index there. Without a
    prompt, or a CLIP to encode it, those of the first example."""
    text = prompt.strip().replace(PLACEHOLDER, trigger_word.strip())
    if not text:
        return 0
    if data.captions:
        data.captions[SAMPLE] = text
    elif clip is not None:
        data.entries[SAMPLE] = encode_caption(clip, text)
    else:
        data.notes.append("sample_prompt is not shown: that needs the CLIP, connected to clip")
        return 0
    return SAMPLE


def add_preserved(data: Data, said: Said, clip: Any) -> Data:
    """With the texts under which the model stays as it is; a note where they cannot be encoded."""
    texts, preserved = said.numbered(SAMPLE - 1)
    if preserved is None:
        return data
    if data.captions:
        return replace(data, captions=data.captions | texts, preserved=preserved)
    if clip is None:
        note = "what the model draws otherwise is not kept: that needs the CLIP, connected to clip"
        return replace(data, notes=[*data.notes, note])
    entries = {number: encode_caption(clip, text) for number, text in texts.items()}
    return replace(data, entries=data.entries | entries, preserved=preserved)


def encode_caption(clip: Any, text: str) -> Any:
    """[tensor, options] of a text, as the host's own node makes it and in the same mode."""
    with torch.inference_mode():
        (entry,) = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return entry
