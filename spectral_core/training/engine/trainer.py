"""One training run from its first step, or the checkpoint it goes on from, to any of its ends.

Between two steps the state is whole. A step that does not come to its end (cancelled, out of memory, an error
in the model) is undone, random numbers included, before the checkpoint is written.

Shapes: :mod:`..objectives.losses`.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

from ...errors import SpectralAdapterError
from ...plots import save_picture
from ..config.config import TrainConfig
from ..objectives.losses import Setup, held_out_loss
from ..runs import checkpoint, distributed, rng, schema
from ..runs.checkpoint import State
from ..runs.events import EventLog, Listener
from ..runs.interrupts import after_the_block
from ..runs.memory_errors import ADVICE, is_out_of_memory
from ..runs.outcome import Best
from ..runs.place import Run, locked
from . import checkpointing as memory
from . import checks, divergence, gate_judgement, gates, progress, validation
from .stepper import Moment, Stepper
from .ungated import ungated_loss

if TYPE_CHECKING:
    from ..runs.outcome import GateReport, TrainResult


# What optimisers and generators raise over states that are not theirs: they share no type.
_OF_RESTORING = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RuntimeError)


class Trainer:
    """See :func:`.loop.train`. ``result`` is filled as the run goes on."""

    def __init__(
        self,
        setup: Setup,
        config: TrainConfig,
        method: str,
        run: Run,
        listener: Listener | None,
        result: TrainResult,
    ) -> None:
        self.setup, self.config, self.method, self.run, self.result = setup, config, method, run, result
        self.world = distributed.world(config.processes)
        self.stepper = Stepper(setup, config, method, self.world)
        self.progress = progress.Progress(divergence.Watch(config.explosion), result.losses)
        self.folder = run.folder if self.world.is_main else None  # where this process writes
        self.log = EventLog(self.folder, run.listener)
        self._step_listener = listener
        self._saved_at = -1
        self.good = divergence.LastGood(self.stepper.named)
        # before a checkpoint is taken over
        self._start = [p.clone() for p in self.good.values] if config.compare_ungated else []

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.stepper.step

    def go(self) -> TrainResult:
        """Train; see :func:`.loop.train`."""
        with self.under_way():
            try:
                checked, patience = self.progress.validation, self.config.patience
                while self.step < self.config.steps and not checked.exhausted(patience):
                    self.advance()
            except KeyboardInterrupt:
                self.result.stopped = True
            except BaseException as error:
                self._save_after(error)
                raise
            return self._finish()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """The folder held, the model prepared, the checkpoint taken over; what steps are made in."""
        with ExitStack() as around:
            around.enter_context(locked(self.folder))
            again = partial(gates.not_counted, self.setup.attachments)
            mode, recast = self.config.checkpointing, self.setup.recast
            around.enter_context(memory.checkpointed(self.setup.roots, mode, again, recast))
            around.callback(self.stepper.count_gates())
            self._begin()
            yield

    # --- beginning and end ----------------------------------------------------------------------------

    def _begin(self) -> None:
        notes = checks.before_training(self.setup, self.config, self.method, self.stepper.groups)
        found, problems = (None, []) if self.run.folder is None else checkpoint.read_newest(self.run.folder)
        if found is None:
            self.log.forget_after(-1)
            described = {"method": self.method, "steps": self.config.steps, "config": self.config.as_dict()}
            parameters = sum(p.numel() for p in self.stepper.parameters)
            self.log.say("start", 0, described | {"parameters": parameters, "processes": self.world.size})
        else:
            notes += problems + self._resume(found)
        for note in notes:
            self._warn(note)

    def _resume(self, found: State) -> list[str]:
        """Take over a checkpoint; what the user should know about it."""
        try:
            if problem := schema.problem(schema.VALUES, found.values):
                raise ValueError(problem)
            return self._taken_over(found)
        except _OF_RESTORING as error:
            raise SpectralAdapterError(
                f"run folder {self.run.folder}: its checkpoint does not fit this run "
                f"({type(error).__name__}: {error}): start the run anew under another name"
            ) from error

    def _taken_over(self, found: State) -> list[str]:
        planned, wanted = int(found.values["steps"]), self.config.steps
        done = progress.steps_done(found, self._identity(), wanted, self.run.folder)
        self.stepper.restore(found)
        self.progress.restore(found, bool(self.setup.held_out))
        self.result.resumed_at = self._saved_at = done
        self.good.keep(done)
        self.log.forget_after(done)
        self.log.say("resume", done, {"steps": wanted})
        if planned == wanted:
            return []
        self.stepper.start = done
        self.progress.validation.since = 0
        return [progress.new_schedule(done, planned, wanted)]

    def _finish(self) -> TrainResult:
        result = self.result
        result.held_out = self.progress.validation.losses
        if self._saved_at != self.step:
            self._checkpoint("stopped" if result.stopped else "finished")
        learned = gate_judgement.learned(self.setup, self.stepper)
        self.stepper.averaging.apply()
        self._offer_best()
        if learned is not None:
            self._judge_gates(learned)
        result.seconds = self.progress.clock.seconds
        kind = "stopped" if result.stopped else "finished"
        self.log.say(kind, self.step, {"seconds": result.seconds, "loss": self.progress.smoothed.value})
        return result

    def _offer_best(self) -> None:
        """The best state to whoever asked for it; with patience it is the result."""
        found, kept = self.progress.validation, self.progress.validation.kept
        if kept is None or found.best_step == self.step or self.result.stopped:
            return
        named, attachments = self.stepper.named, self.setup.attachments
        if self.config.patience:
            validation.put_back(kept, named, attachments)
            why = "early: nothing better came" if found.exhausted(self.config.patience) else "as planned"
            self._warn(
                f"ended at step {self.step} of {self.config.steps} ({why}); the adapter is that of step "
                f"{found.best_step}, with the lowest loss on held-out pictures ({found.best:.4f})"
            )
            return
        self.result.best = Best(
            found.best_step, found.best, partial(validation.applied, kept, named, attachments)
        )

    def _judge_gates(self, learned: GateReport) -> None:
        """The gates' share, and the loss with and without their decisions; what should be known of both."""
        compares = not self.result.stopped
        found = gate_judgement.judged(learned, self.stepper, compares, self._ungated)
        self.result.gates = found
        self.log.say("gates", self.step, found.as_dict())
        if compares:
            self.result.notes += found.lines()
            for line in found.warnings():
                self._warn(line)

    def _ungated(self) -> float | None:
        """The loss of an adapter without gates and of the same effective rank, where it is asked for."""
        if not self.config.compare_ungated:
            return None
        self.log.say("comparison", self.step, {"steps": self.config.steps})
        ranks = {n: total / count for n, (total, count, _) in self.stepper.open_gates.calibration.items()}
        return ungated_loss(
            self.setup, self.config, self.method, self.world, self._start, ranks, self.run.cancel
        )

    # --- a step ---------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One optimiser step with everything around it; an error undoes it and passes on."""
        before = self.stepper.moment()
        try:
            self.stepper.prepare()
            loss, power, norm = self._gradients(before)
            self._check(loss, power, norm, before)
        except BaseException:
            self.stepper.undo(before)
            raise
        with after_the_block():
            self.stepper.update()
            self.progress.losses.append(loss)
            self.progress.smoothed.add(loss)
        pace = self.progress.clock.tick()
        self._report(loss, norm, pace, self._validate())
        every = self.run.checkpoint_every
        if every and self.step % every == 0 and self.step < self.config.steps:
            self._checkpoint("interval")
        if self.run.sample_every and self.step % self.run.sample_every == 0:
            self._sample()

    def _gradients(self, before: Moment) -> tuple[float, float, float]:
        """Those of the step; where memory runs out, with fewer weights on the device, as often as that
        helps. The numbers are the same."""
        while True:
            try:
                return self.stepper.gradients(self.run.cancel)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or not self._made_room(error):
                    raise
            self.stepper.undo(before)
            self.stepper.prepare()

    def _made_room(self, error: BaseException) -> bool:
        """Whether weights could be taken off the device, so that the step can be tried again."""
        if self.setup.make_room is None or self.world.size > 1:
            return False
        traceback.clear_frames(error.__traceback__)  # which hold the step's activations
        if not self.setup.make_room():
            return False
        self._warn(f"memory ran out in step {self.step + 1}: from there on less of the model is kept there")
        return True

    def _validate(self) -> float | None:
        """The loss on the held-out pictures with the parameters to use and hard gates, where it is due."""
        last = self.step == self.config.steps
        if not self.setup.held_out or (self.step % self.config.validation_every and not last):
            return None
        with self._as_used(), self.stepper.autocast():
            loss = held_out_loss(self.setup, self.config)
            if self.world.size > 1:  # one decision for all processes
                (mean,) = self.world.mean([torch.tensor(loss, device=self.stepper.device)])
                loss = float(mean)
            frozen_from = gates.plan(self.config, self.stepper.start).frozen_from
            counts = not self.config.freeze_gates or self.step >= frozen_from
            found = self.progress.validation
            if found.add(self.step, loss, counts):
                found.kept = validation.snapshot(self.stepper.named, self.setup.attachments)
        self.progress.clock.skip()
        return loss

    def _report(self, loss: float, norm: float, pace: float, held_out: float | None) -> None:
        opened = self.stepper.opened
        rates = self.stepper.rates()
        values: dict[str, Any] = {
            "steps": self.config.steps,
            "loss": loss,
            "smoothed_loss": self.progress.smoothed.value,
            "learning_rate": next(iter(rates.values())),
            "learning_rates": rates,
            "gradient_norm": norm,
            "seconds": self.progress.clock.seconds,
            "steps_per_second": 1 / pace if pace > 0 else 0.0,
            "seconds_left": pace * (self.config.steps - self.step),
        }
        if self.stepper.preserved is not None:
            values["preservation_loss"] = self.stepper.preserved
        if held_out is not None:
            values |= {"held_out_loss": held_out, "best_step": self.progress.validation.best_step}
        if opened:
            values["open_share"] = self.stepper.open_gates.share(opened)
            values["temperature"] = self.setup.attachments[0].gates.temperature
            if self.step % gates.TOLD_EVERY == 0 or self.step == self.config.steps:
                ranks = self.stepper.open_gates.ranks
                values["open_by_layer"] = {name: mean / ranks[name] for name, mean in opened.items()}
                values["open_by_level"] = self.stepper.open_gates.take_levels()
        event = self.log.say("step", self.step, values)
        if self._step_listener is not None:
            self._step_listener(event)

    # --- going wrong ----------------------------------------------------------------------------------

    def _check(self, loss: float, power: float, norm: float, before: Moment) -> None:
        """Stop at a loss or gradient that is not finite, and at a loss that explodes."""
        if not math.isfinite(loss):
            raise self._diverged(f"the loss became {loss}", self.stepper.culprit(before))
        if not math.isfinite(norm) and self.stepper.scaler is None:
            raise self._diverged("the gradient is not finite", self.stepper.culprit(before))
        exploded, good = self.progress.watch.add(loss, power)
        if exploded:
            text = f"the loss explodes ({loss:.3g}, it began at {self.progress.watch.first[0]:.3g})"
            raise self._diverged(text, f", most changed {self.good.most_changed()}")
        if good:
            self.good.keep(self.step)

    def _diverged(self, what: str, where: str) -> SpectralAdapterError:
        """The error to raise; the parameters are the last good ones again, later checkpoints are gone."""
        failed, rate = self.step + 1, self.stepper.groups[0].rate
        self.good.put_back()
        self.stepper.whole = False  # the optimiser's state is not that of these parameters
        saved = ""
        if self.folder is not None:
            checkpoint.discard_after(self.folder, self.good.step)
            if found := checkpoint.listed(self.folder):
                self.result.checkpoint = found[0][1]
                saved = f"; the checkpoint of step {found[0][0]} is kept"
        return SpectralAdapterError(
            f"{what} at step {failed}{where}: lower the learning rate (now {rate:g}). The adapter is back at "
            f"step {self.good.step}{saved}"
        )

    def _save_after(self, error: BaseException) -> None:
        """Keep what the last whole step left, whatever went wrong in the next."""
        text = f"{type(error).__name__}: {error}"
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # which hold the step's activations
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            text += f". Out of memory: {ADVICE}"
        if self.stepper.whole and self._saved_at != self.step:
            self._checkpoint("error")
        self.log.say("error", self.step, {"text": text})

    def _warn(self, text: str) -> None:
        self.result.notes.append(text)
        self.log.say("warning", self.step, {"text": text})

    @contextmanager
    def _as_used(self) -> Iterator[None]:
        """The parameters to use and hard gates; the training goes on as if the block had not been."""
        kept = [a.gates.state() for a in self.setup.attachments]
        with ExitStack() as around:
            around.callback(self.stepper.open_gates.step)
            for attachment, before in zip(self.setup.attachments, kept, strict=True):
                around.callback(attachment.gates.restore, before)
                around.enter_context(attachment.gates.inference())
            around.enter_context(rng.undisturbed())
            around.enter_context(self.stepper.averaging.applied())
            around.enter_context(torch.no_grad())
            yield

    # --- samples and checkpoints ----------------------------------------------------------------------

    def _sample(self) -> None:
        """Pictures of the parameters to use, with hard gates; the training goes on as if there were none."""
        if self.run.sampler is None or not self.world.is_main:
            return
        with self._as_used():
            pictures = self.run.sampler(self.step)
        self.log.say("sample", self.step, {"files": self._save_pictures(pictures)})
        self.progress.clock.skip()

    def _save_pictures(self, pictures: Sequence[Image]) -> list[str]:
        if self.folder is None:
            return []
        names = [f"step-{self.step:08d}-{i}.png" for i in range(len(pictures))]
        try:
            for name, picture in zip(names, pictures, strict=True):
                save_picture(picture, self.folder / "samples" / name)
        except SpectralAdapterError as error:
            self._warn(f"samples of step {self.step} could not be written ({error})")
            return []
        return names

    def _checkpoint(self, reason: str) -> None:
        """Write one; a disk that is full costs the checkpoint and not the run."""
        if self.folder is None:
            return
        try:
            path = checkpoint.write(self._state(), self.folder, self.step)
        except SpectralAdapterError as error:
            kept = checkpoint.listed(self.folder)[:1]
            last = f"the last good one is that of step {kept[0][0]}" if kept else "there is none yet"
            self._warn(f"no checkpoint could be written at step {self.step} ({error}); {last}")
            return
        self.result.checkpoint, self._saved_at = path, self.step
        checkpoint.keep_newest(self.folder, self.run.keep)
        self.log.say("checkpoint", self.step, {"file": path.name, "reason": reason})
        self.progress.clock.skip()

    def _identity(self) -> dict[str, Any]:
        return progress.identity(self.setup, self.config, self.method, self.stepper.named, self.world.size)

    def _state(self) -> State:
        found = self.stepper.state()
        found.values |= {"identity": self._identity(), "steps": self.config.steps}
        self.progress.put_into(found, bool(self.setup.held_out))
        return found
