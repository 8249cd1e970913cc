"""What the host calls: tags come in, adapters go on its model, and everything comes off again.

One object for the process, made by ``scripts/spectral_adapters.py``; the host runs one picture at a time.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spectral_core.errors import SpectralAdapterError

from . import a1111, forge, infotext, request
from .active import Active, Host
from .jobs import Jobs, in_host
from .library import Library
from .places import layout_of

LOG = logging.getLogger("spectral_adapters")
_CACHES = ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc")


def host_of(sd_model: Any) -> Host:
    """Told by what the model has, never by a version."""
    return forge if hasattr(sd_model, "forge_objects") else a1111  # type: ignore[return-value]


class Extension:
    """The adapters of the running picture. folders: see :class:`.library.Library`."""

    def __init__(self, folders: Sequence[Path], lora_folders: Sequence[Path] = ()) -> None:
        self.library = Library(folders, lora_folders)
        self.active = Active()
        self.jobs = Jobs(in_host)
        self._sd_model: Any = None
        self._requests: tuple[request.Request, ...] = ()
        self._seen: dict[str, object] = {}
        self._end: weakref.finalize | None = None
        self._picture: weakref.ref[Any] | None = None  # whose adapters are on

    def activate(self, p: Any, tags: Iterable[Sequence[object]]) -> None:
        """Before a batch and before its second pass: exactly these adapters are on the model afterwards.

        The host swallows exceptions from here and draws on, so mistakes go under the picture.
        """
        tags = list(tags)
        if self._sd_model is not None and not tags and not getattr(p, "prompts", None):
            return  # no picture: the host tries a model that it has loaded in the middle of one (a refiner)
        self.clear()
        # The host does not deactivate after an exception. Later runs are none of this one's business.
        self._end, self._picture = weakref.finalize(p, self.clear), weakref.ref(p)
        if any(request.TAG.search(text) for text in getattr(p, "negative_prompts", None) or ()):
            self._tell(p, "tags work in the prompt only, not in the negative prompt")
        hashes: dict[str, str] = {}
        wanted = []
        for pieces in tags:
            try:
                found = request.parse(pieces)
                hashes |= self._put(p, found)
                wanted.append(found)
            except SpectralAdapterError as error:
                self._tell(p, str(error))
            except Exception as error:  # a fault of ours; the host prints where, and draws on
                self._tell(p, f"{pieces[0]} was not applied: {type(error).__name__}: {error}")
                self.clear()
                raise
        self._requests = tuple(wanted)
        for note in self.active.notes:
            self._tell(p, note)
        if hashes:
            known = infotext.read(p.extra_generation_params.get(infotext.KEY, ""))
            p.extra_generation_params[infotext.KEY] = infotext.entry(known | hashes)

    def _put(self, p: Any, wanted: request.Request) -> dict[str, str]:
        """Put one adapter on the model; its name and hash."""
        self._sd_model = p.sd_model
        host = host_of(p.sd_model)
        try:
            entry = self.library.find(wanted.name)
            state: object = self.library.state_of(entry)
        except SpectralAdapterError:
            self._seen[wanted.name] = None
            raise
        if self._seen.setdefault(wanted.name, state) != state:
            self._seen[wanted.name] = state
            _forget_encodings(p)  # the host knows them by the tag alone, and the file behind it has changed
        adapter = self.library.load(entry, layout_of(host.unet(p.sd_model)))
        self.active.put(wanted.name, request.applied(adapter, wanted), host, p.sd_model)
        return {wanted.name: self.library.hash_of(entry)}

    def clear(self) -> None:
        """The model as it was."""
        if self._end is not None:
            self._end.detach()
        self._requests, self._sd_model, self._end, self._picture = (), None, None, None
        self.active.clear()

    def on_step(self, params: Any) -> None:
        """Before every call of the picture's model."""
        if self.active.is_on:
            self.active.set_progress(host_of(self._sd_model).progress(self._sd_model, params))

    def on_model(self, sd_model: Any) -> None:
        """The host has loaded a model: while a picture is drawn (a refiner) its adapters move to it."""
        wanted = self._requests
        if self._sd_model is None:
            return
        # The same object may hold another model's weights now, and the host has forgotten our words.
        self.active.clear()
        host = host_of(sd_model)
        for each in wanted:
            try:
                adapter = self.library.load(self.library.find(each.name), layout_of(host.unet(sd_model)))
                self.active.put(each.name, request.applied(adapter, each), host, sd_model)
            except SpectralAdapterError as error:
                self.active.notes.append(str(error))
        self._sd_model, self._requests = sd_model, wanted
        p = self._picture() if self._picture is not None else None
        for note in self.active.notes:
            if p is None:
                LOG.warning("Spectral Adapters: %s", note)
            else:
                self._tell(p, f"after the change of models: {note}")

    def add_tags(self, p: Any, lines: object) -> None:
        """The adapters of a field (one to a line) as tags of every prompt, where the host's cache of
        encodings and the picture's parameters see them."""
        tags = request.tags_in_lines(lines) if isinstance(lines, str) else ""
        if not tags:
            return
        for name in ("all_prompts", "all_hr_prompts"):
            prompts = getattr(p, name, None)
            if prompts:
                setattr(p, name, [prompt + tags for prompt in prompts])

    def name_of_hash(self, digits: str) -> str | None:
        """For pasted parameters."""
        entry = self.library.by_hash(digits)
        return entry.name if entry else None

    def _tell(self, p: Any, text: str) -> None:
        LOG.warning("Spectral Adapters: %s", text)
        p.comment(f"Spectral Adapters: {text}")
        known = p.extra_generation_params.get(infotext.PROBLEMS)  # the API's answer has no comments
        told = [] if known is None else known.split("; ")
        if text not in told:
            p.extra_generation_params[infotext.PROBLEMS] = "; ".join([*told, text])


def _forget_encodings(p: Any) -> None:
    for name in _CACHES:
        cache = getattr(p, name, None)
        if isinstance(cache, list):
            cache[:] = [None] * len(cache)
