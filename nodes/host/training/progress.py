"""What the page sees of a training: the progress bar, the loss curve while it grows, and the stop button.

Shapes: none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NoReturn

import comfy.model_management
import comfy.utils
from PIL import Image

from ....spectral_core.plots import line_plot
from ....spectral_core.training.runs.events import Event, Smoothed

PICTURE_SECONDS = 1.0  # at most one picture of the curve in this time
_PREVIEW = 512  # pixels
_SMOOTHING = 0.9


class Progress:
    """A listener of the trainer's events. ``cancel`` is asked before each batch.

    The host's progress bar may raise its interrupt at any update. That would look like an error to the
    trainer, so it is kept until the trainer has stopped (:meth:`stop`).
    """

    def __init__(self, name: str, steps: int, node: str = "Train Adapter") -> None:
        self._name, self._steps, self._node = name, steps, node
        self._bar = comfy.utils.ProgressBar(steps)
        self._losses: dict[int, float] = {}
        self._drawn_at = 0.0
        self._stop: BaseException | None = None
        self._sample: Image.Image | None = None

    def shown(self, sampler: Callable[[int], list[Image.Image]]) -> Callable[[int], list[Image.Image]]:
        """The sampler, its first picture beside the curve from then on."""

        def draw(step: int) -> list[Image.Image]:
            pictures = sampler(step)
            self._sample, self._drawn_at = pictures[0], 0.0
            return pictures

        return draw

    def __call__(self, event: Event) -> None:
        kind, step = event["event"], int(event["step"])
        if kind in ("warning", "error"):
            logging.warning("%s, %s: %s", self._node, self._name, event["text"])
        if kind == "resume":
            logging.info("%s, %s: goes on from step %d of %d", self._node, self._name, step, self._steps)
        if kind == "step" and event["loss"] is not None:
            self._losses[step] = float(event["loss"])
            self._show(step, event)

    def _show(self, step: int, event: Event) -> None:
        now = time.monotonic()
        picture = None
        if now - self._drawn_at >= PICTURE_SECONDS or step >= self._steps:
            self._drawn_at = now
            left = event.get("seconds_left")
            title = f"{self._name}: step {step} of {self._steps}, loss {event['smoothed_loss']:.4f}"
            title += "" if left is None else f", {left:.0f} s left"
            drawn = curve(list(self._losses.values()), title, min(self._losses))
            if self._sample is not None:
                drawn = beside(drawn, self._sample)
            picture = ("JPEG", drawn, _PREVIEW if self._sample is None else 2 * _PREVIEW)
        try:
            self._bar.update_absolute(step, self._steps, picture)
        except comfy.model_management.InterruptProcessingException as stop:
            self._stop = stop

    def cancel(self) -> bool:
        return self._stop is not None or bool(comfy.model_management.processing_interrupted())

    def stop(self, text: str) -> NoReturn:
        """Raise the host's own interrupt; ``text`` goes into the log."""
        logging.info("%s, %s: %s", self._node, self._name, text)
        comfy.model_management.throw_exception_if_processing_interrupted()  # which takes the request back
        raise self._stop or comfy.model_management.InterruptProcessingException


def check_interrupt() -> None:
    """Raises the host's interrupt where the user has asked for one."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures in a row, the right one as high as the left."""
    width = max(1, round(right.width * left.height / right.height))
    row = Image.new("RGB", (left.width + width, left.height))
    row.paste(left, (0, 0))
    row.paste(right.resize((width, left.height)), (left.width, 0))
    return row


def curve(losses: list[float], title: str, first: int = 1) -> Image.Image:
    """The losses by step, as they are and smoothed."""
    smoothed, means = Smoothed(_SMOOTHING), list[float]()
    for loss in losses:
        mean = smoothed.add(loss)
        means.append(mean if means else loss)  # the first to the last bit, so that one point is one point
    steps = list(range(first, first + len(losses)))
    series: dict[str, Any] = {"loss": (steps, losses), "smoothed": (steps, means)}
    return line_plot(series, "step", "loss", title)
