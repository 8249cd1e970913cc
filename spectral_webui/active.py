"""The adapters that are on a webui's model at the moment: put on, followed over the steps, taken off.

Everything is computed beside the weights (:func:`spectral_core.attach.attaching.attach`), so that the model's
tensors never change; with :meth:`Active.clear` no trace is left in it.

Shapes: progress is a number or (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from spectral_core.adapter.adapter import Adapter
from spectral_core.attach.attaching import Attachment, attach
from spectral_core.errors import SpectralAdapterError

from . import places
from .open_clip import OpenCLIPTree
from .pipeline import HostPipeline

_SHOWN = 3


class Host(Protocol):
    """What differs between the hosts: where the modules are, how words are added, how far the steps are."""

    def unet(self, sd_model: Any) -> nn.Module: ...

    def text_encoders(self, sd_model: Any) -> dict[str, nn.Module]: ...

    def known_names(self, sd_model: Any) -> Mapping[str, Any]: ...

    def add_words(self, sd_model: Any, words: Mapping[str, Mapping[str, Tensor]]) -> Callable[[], None]: ...

    def progress(self, sd_model: Any, params: Any) -> float | Tensor: ...

    def pipeline(self, sd_model: Any) -> AbstractContextManager[HostPipeline]: ...


@dataclass
class Active:
    """What is on the model. ``notes`` are for the user."""

    notes: list[str] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)
    _on_steps: list[Attachment] = field(default_factory=list)
    _words: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    _encoders: dict[str, nn.Module] | None = None

    @property
    def is_on(self) -> bool:
        """Whether anything follows the steps."""
        return bool(self._on_steps)

    def put(self, name: str, adapter: Adapter, host: Host, sd_model: Any) -> None:
        """One more adapter. Raises SpectralAdapterError, and leaves what was there before, where it does not
        fit the model."""
        unet, encoders = host.unet(sd_model), self._text_encoders(host, sd_model)
        found = places.sides(
            adapter, places.layout_of(unet), tuple(encoders), lambda: host.known_names(sd_model)
        )
        if adapter.layers and not found.adapters and found.lost:
            first, why = next(iter(found.lost.items()))
            raise SpectralAdapterError(
                f"{name}: none of its {len(found.lost)} layers has a place in this model, such as {first}: "
                f"{why}. Is it for another model?"
            )
        lost = dict(found.lost)
        with ExitStack() as stack:  # undone where the second half fails
            on_steps = []
            for side, part in found.adapters.items():
                root = unet if side == places.MODEL else encoders[side]
                if isinstance(root, OpenCLIPTree) and not root.is_rerouted:
                    self._stack.enter_context(root.rerouted())
                attachment = _attached(name, root, part, side)
                stack.callback(attachment.remove)
                lost |= attachment.report.problems
                if side == places.MODEL:
                    attachment.set_progress(0.0)
                    on_steps.append(attachment)
            words = self._new_words(name, adapter)
            if words:
                stack.callback(host.add_words(sd_model, words))
            self._stack.push(stack.pop_all())
        self._words |= words
        self._on_steps += on_steps
        if lost:
            some = "; ".join(f"{layer}: {why}" for layer, why in list(lost.items())[:_SHOWN])
            self.notes.append(f"{name}: {len(lost)} layers have no place in this model: {some}")

    def _text_encoders(self, host: Host, sd_model: Any) -> dict[str, nn.Module]:
        """The same trees for all adapters: some stand for other modules."""
        if self._encoders is None:
            self._encoders = host.text_encoders(sd_model)
        return self._encoders

    def _new_words(self, name: str, adapter: Adapter) -> dict[str, Mapping[str, Tensor]]:
        words: dict[str, Mapping[str, Tensor]] = {}
        for word, rows in adapter.tokens.items():
            known = self._words.get(word)
            if known is None:
                words[word] = rows
            elif not _equal(known, rows):
                raise SpectralAdapterError(
                    f"{name}: another adapter brings the word {word!r} with another meaning: use one of them"
                )
        return words

    def set_progress(self, progress: float | Tensor) -> None:
        """0 noisiest … 1 cleanest."""
        for attachment in self._on_steps:
            attachment.set_progress(progress)

    def clear(self) -> None:
        """Take everything off; a second time does nothing."""
        self._on_steps, self._words, self.notes, self._encoders = [], {}, [], None
        stack, self._stack = self._stack, ExitStack()
        stack.close()


def _attached(name: str, root: nn.Module, adapter: Adapter, side: str) -> Attachment:
    try:
        return attach(root, adapter, part=side, strict=False)
    except SpectralAdapterError as error:
        raise SpectralAdapterError(f"{name}: {error}") from error


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(bool((first[k] == second[k]).all()) for k in first)


def rows_of(progress: Iterable[float]) -> float | Tensor:
    """One number where all rows agree, else (B,)."""
    from torch import tensor

    values = [min(max(value, 0.0), 1.0) for value in progress]
    return values[0] if len(set(values)) == 1 else tensor(values)
