"""What the host sees of a training: the progress bar, the events for the page, and the stop button."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import comfy.model_management
import comfy.utils
from PIL import Image

from ....spectral_core.plots import line_plot
from ....spectral_core.training.runs.events import Event, Smoothed
from .live import Live, Wish

_SMOOTHING = 0.9


class Progress:
    """A listener of the trainer's events. ``cancel`` is asked before each batch.

    The host's progress bar may raise its interrupt at any update. That would look like an error to the
    trainer, so it is kept until the trainer has stopped (:meth:`stop`).
    """

    def __init__(self, name: str, steps: int, node: str = "Train Adapter", asked: str = "") -> None:
        self._name, self._steps, self._node = name, steps, node
        self._bar = comfy.utils.ProgressBar(steps)
        self._stop: BaseException | None = None
        self._live = Live(name, asked or name)
        self._wish: Wish | None = None
        self._step = 0

    def keeps(self, folder: Path, save: Callable[[int], Path]) -> None:
        """From now on ``save`` is called, between steps, when the page asks for the adapter as it is."""
        self._wish = Wish(folder, save)

    def __call__(self, event: Event) -> None:
        kind, step = event["event"], int(event["step"])
        if kind in ("warning", "error"):
            logging.warning("%s, %s: %s", self._node, self._name, event["text"])
        if kind == "resume":
            logging.info("%s, %s: goes on from step %d of %d", self._node, self._name, step, self._steps)
        self._step = step
        self._live(event)
        if kind == "step":
            try:
                self._bar.update_absolute(step, self._steps)
            except comfy.model_management.InterruptProcessingException as stop:
                self._stop = stop

    def cancel(self) -> bool:
        if self._wish is not None:
            self._wish.fulfil(self._step)
        return self._stop is not None or bool(comfy.model_management.processing_interrupted())

    def stop(self, text: str) -> NoReturn:
        """Raise the host's own interrupt; ``text`` goes into the log."""
        logging.info("%s, %s: %s", self._node, self._name, text)
        comfy.model_management.throw_exception_if_processing_interrupted()  # which takes the request back
        raise self._stop or comfy.model_management.InterruptProcessingException


def check_interrupt() -> None:
    """Raises the host's interrupt where the user has asked for one."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def curve(
    losses: list[float], title: str, first: int = 1, held_out: Mapping[int, float] | None = None
) -> Image.Image:
    """The losses by step, as they are and smoothed, and those on held-out pictures."""
    smoothed, means = Smoothed(_SMOOTHING), list[float]()
    for loss in losses:
        mean = smoothed.add(loss)
        means.append(mean if means else loss)  # the first to the last bit, so that one point is one point
    steps = list(range(first, first + len(losses)))
    series: dict[str, Any] = {"loss": (steps, losses), "smoothed": (steps, means)}
    if held_out:
        series["held out"] = (list(held_out), list(held_out.values()))
    return line_plot(series, "step", "loss", title)
