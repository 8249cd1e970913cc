"""Long work of the tab and the routes, one at a time: it runs beside the page, which sees how far it is and
can stop it. Pictures wait meanwhile, and it waits for them: all take the host's lock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from spectral_core.errors import SpectralAdapterError
from spectral_core.training.runs.events import Event

_KEPT_LINES = 12
Work = Callable[["Job"], tuple[str, "Image.Image | None"]]
"""Gets its job; the result in words and as a picture. KeyboardInterrupt: it was stopped."""


@dataclass
class Job:
    """One piece of work. state: waiting, running, finished, stopped or failed."""

    kind: str
    name: str
    state: str = "waiting"
    doing: str = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    text: str = ""
    picture: Image.Image | None = None
    lines: list[str] = field(default_factory=list)
    asked_to_stop: bool = False
    begun: float = field(default_factory=time.monotonic)
    interrupted: Callable[[], bool] = lambda: False

    @property
    def is_over(self) -> bool:
        return self.state in ("finished", "stopped", "failed")

    def cancel(self) -> bool:
        """Whether it shall stop: asked here, or by the host's own button."""
        return self.asked_to_stop or self.interrupted()

    def check(self) -> None:
        """KeyboardInterrupt where it shall stop."""
        if self.cancel():
            raise KeyboardInterrupt

    def say(self, text: str) -> None:
        self.doing = text
        self.lines = [*self.lines, text][-_KEPT_LINES:]

    def __call__(self, event: Event) -> None:
        """A training's events."""
        kind = event["event"]
        if kind in ("start", "resume"):
            self.steps, self.step = int(event["steps"]), int(event["step"])
            self.say("training" if kind == "start" else f"goes on from step {self.step}")
        elif kind == "step":
            self.step, self.loss = int(event["step"]), float(event["smoothed_loss"])
        elif kind in ("warning", "error"):
            self.lines = [*self.lines, str(event["text"])][-_KEPT_LINES:]

    def shown(self) -> str:
        """How it stands, for people."""
        head = f"{self.kind} {self.name}: {self.state}"
        if self.state == "running":
            head += f", {self.doing}" if self.doing else ""
            head += f", step {self.step} of {self.steps}" if self.steps else ""
            head += f", loss {self.loss:.4f}" if self.loss is not None else ""
            head += f", {time.monotonic() - self.begun:.0f} s"
        return "\n".join([head, *([self.text] if self.text else []), *self.lines])

    def values(self) -> dict[str, Any]:
        """The same for programs."""
        names = ("kind", "name", "state", "doing", "step", "steps", "loss", "text")
        return {name: getattr(self, name) for name in names} | {"lines": list(self.lines)}


class Jobs:
    """The job that runs, or the last one. run: calls a function as the host wants heavy work to be called,
    and gives what says whether its own button was pressed."""

    def __init__(self, run: Callable[[Job, Callable[[], None]], None]) -> None:
        self._run, self._lock = run, threading.Lock()
        self.job: Job | None = None

    def start(self, kind: str, name: str, work: Work) -> Job:
        """Begin it; SpectralAdapterError while another one runs."""
        with self._lock:
            if self.job is not None and not self.job.is_over:
                raise SpectralAdapterError(
                    f"{self.job.kind} {self.job.name} is still {self.job.state}: stop it, or wait for it"
                )
            job = self.job = Job(kind, name)
        threading.Thread(target=self._carry_out, args=(job, work), daemon=True).start()
        return job

    def _carry_out(self, job: Job, work: Work) -> None:
        def run() -> None:
            if job.asked_to_stop:
                job.state = "stopped"
                return
            job.state, job.begun = "running", time.monotonic()
            try:
                job.text, job.picture = work(job)
                job.state = "stopped" if job.asked_to_stop and job.state != "finished" else "finished"
            except KeyboardInterrupt:
                job.state = "stopped"
            except SpectralAdapterError as error:
                job.text, job.state = str(error), "failed"
            except Exception as error:  # a fault of ours: the page must not wait for ever
                job.text, job.state = f"{type(error).__name__}: {error}", "failed"
                raise

        try:
            self._run(job, run)
        finally:
            if not job.is_over:
                job.state = "failed"

    def stop(self) -> str:
        """Ask the running job to stop; what to say."""
        if self.job is None or self.job.is_over:
            return "nothing runs"
        self.job.asked_to_stop = True
        return f"{self.job.kind} {self.job.name} stops after this step; what it has learned is kept"

    def shown(self) -> str:
        return "nothing has run yet" if self.job is None else self.job.shown()

    def values(self) -> Mapping[str, Any]:
        return {"state": "none"} if self.job is None else self.job.values()


def in_host(job: Job, function: Callable[[], None]) -> None:
    """Under the host's lock, shown as its job, in the thread in which it computes."""
    from modules import shared
    from modules.call_queue import queue_lock

    with queue_lock:
        shared.state.begin(f"spectral {job.kind}")
        job.interrupted = lambda: bool(shared.state.interrupted)
        try:
            main_thread = _main_thread()
            if main_thread is None:
                function()
            else:
                main_thread.run_and_wait_result(function)
        finally:
            job.interrupted = lambda: False
            shared.state.interrupted = False
            shared.state.end()


def _main_thread() -> Any:
    """Forge's, which moves models much faster between calls from one thread; None elsewhere."""
    try:
        from modules_forge import main_thread
    except ImportError:
        return None
    return main_thread
