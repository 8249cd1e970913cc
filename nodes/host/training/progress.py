"""A named run as the host sees it: the progress bar, the events for the page, the stop button, its ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from PIL import Image

from ....spectral_core.adapter.adapter import Adapter
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.files.adapter_file import save
from ....spectral_core.plots import line_plot
from ....spectral_core.training.config.config import TrainConfig
from ....spectral_core.training.engine.named_run import (
    Begin,
    Output,
    Prepare,
    Prepared,
    Trained,
    named_run,
)
from ....spectral_core.training.runs.events import Event, Smoothed
from ....spectral_core.training.runs.memory_errors import is_out_of_memory
from ....spectral_core.training.runs.place import Place
from ..files import paths
from .live import Live, Wish

_SMOOTHING = 0.9


class Progress:
    """A listener of a run's events. asked: the name that the node has. ``cancel`` is asked before each batch.

    The host's progress bar may raise its interrupt at any update. That would look like an error to the
    trainer, so it is kept until the trainer has stopped (:meth:`stop`).
    """

    def __init__(self, steps: int, asked: str, node: str = "Train Adapter") -> None:
        self._name, self._asked, self._steps, self._node = asked, asked, steps, node
        self._bar = comfy.utils.ProgressBar(steps)
        self._stop: BaseException | None = None
        self._live = Live(asked, asked)
        self._wish: Wish | None = None
        self._step = 0

    def carry_out(
        self,
        config: TrainConfig,
        settings: Mapping[str, Any],
        begin: Begin,
        prepare: Prepare,
        notes: Sequence[str],
        checkpoint_every: int,
        sample_every: int = 0,
    ) -> Trained:
        """:func:`named_run` in the host's output folder, more steps going on from a finished run.

        Raises the host's interrupt where the user has asked for one, and out of memory as the host knows it,
        which then makes room.
        """
        adapters = Path(folder_paths.get_output_directory(), paths.KEY)
        output = Output(
            adapters,
            self._asked,
            extend=True,
            listener=self,
            cancel=self.cancel,
            checkpoint_every=checkpoint_every,
            sample_every=sample_every,
            runs=paths.runs(),
        )
        try:
            done = named_run(output, config, settings, begin, partial(self._watched, prepare), notes)
        except KeyboardInterrupt:
            if not self.cancel():
                raise
            self.stop("stopped before the first step, while another program held a lock")
        except SpectralAdapterError as error:
            cause = error.__cause__
            if cause is None or not is_out_of_memory(cause):
                raise
            kind = torch.cuda.OutOfMemoryError if isinstance(cause, RuntimeError) else MemoryError
            raise kind(str(error)) from cause
        if done.result.stopped:
            self.stop(
                f"stopped at step {len(done.result.losses)} of {config.steps}; a checkpoint is kept: queue "
                "the same settings again to go on from there"
            )
        if not done.reused and self.cancel():
            self.stop("finished; the workflow is stopped as asked")
        return done

    @contextmanager
    def _watched(self, prepare: Prepare, begun: Adapter, place: Place) -> Iterator[Prepared]:
        """From now on the run has its name, and what it has learned is kept, between steps, when the page
        asks for it."""
        with prepare(begun, place) as ready:

            def keep(steps: int) -> Path:
                path = paths.unfinished_file(place.name, steps)
                path.parent.mkdir(parents=True, exist_ok=True)
                with torch.no_grad():
                    return save(ready.adapter(steps), path, overwrite=True)

            self._name, self._live = place.name, Live(place.name, self._asked)
            self._wish = Wish(place.folder, keep)
            try:
                yield ready
            finally:
                self._wish = None

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
