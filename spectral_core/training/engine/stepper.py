"""The optimiser's side of a run: what one step does, how it is undone, and all that the next one depends on.

Shapes: :mod:`..objectives.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SpectralAdapterError
from ...maths.precision import full_precision
from ..config.config import TrainConfig
from ..objectives.losses import Batch, Setup, batch_loss, draw, draw_preserved
from ..runs import checkpoint, rng, state
from ..runs.checkpoint import State
from ..runs.distributed import World
from . import divergence, gates, optim
from .averaging import Averaging
from .gate_parameters import GateParameters, compared, logit_above

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Moment:
    """What a step changes before the optimiser does: enough to undo it."""

    generator: Tensor
    order: Any
    prior: Any
    random: rng.RandomState
    gates: list[dict[str, Any]]


class Stepper:
    """The parameters with their optimiser, random numbers and gates.

    step: optimiser steps done. start: the step with which the schedule began. whole: False while the
    optimiser is at work, when nothing may be saved. gates_learn: off, the gates stay as they are.
    """

    def __init__(
        self, setup: Setup, config: TrainConfig, method: str, world: World, gates_learn: bool = True
    ) -> None:
        self.setup, self.config, self.world, self.gates_learn = setup, config, world, gates_learn
        adapters = [item for attachment in setup.attachments for item in attachment.named_parameters()]
        factors = {k: v for attachment in setup.attachments for k, v in attachment.rate_factors().items()}
        self.groups = optim.groups(adapters, setup.tokens, config, method, factors)
        self.named = [*adapters, *((f"word{i}", p) for i, p in enumerate(setup.tokens))]
        self.parameters = [p for _, p in self.named]
        self.device = self.parameters[0].device
        world.same_everywhere([p.data for p in self.parameters])
        self.optimisers = optim.build(self.groups, config)
        optim.set_train_mode(self.optimisers, True)
        self.averaging = Averaging(self.parameters, self.optimisers, config.ema)
        self.scaler = _scaler(self.device) if config.precision == "fp16" else None
        self.generator = torch.Generator().manual_seed(config.seed)
        self.open_gates = gates.OpenGates()
        self.decisions = [GateParameters(attachment) for attachment in setup.attachments]
        self.opened: dict[str, float] = {}  # layer -> mean open gates of the last step
        budget = max((one.budget for one in self.decisions), default=0.0)
        # a budget is kept by itself
        self.target = 0.0 if budget or not gates_learn else config.target_open
        self.share = 1.0  # of open gates, smoothed over the last steps
        self.preserved: float | None = None  # the loss of the last step's batch that keeps the model
        self.step = 0
        self.start = 0
        self.whole = True

    def count_gates(self) -> Callable[[], None]:
        """Let the open gates be counted where nobody else does; the undo."""
        free = [a for a in self.setup.attachments if a.gates.recorder is None]
        for attachment in free:
            attachment.gates.recorder = self.open_gates

        def undo() -> None:
            for attachment in free:
                attachment.gates.recorder = None
            for attachment in self.setup.attachments:
                attachment.gates.logits = None

        return undo

    # --- one step -------------------------------------------------------------------------------------

    def moment(self) -> Moment:
        prior = None if self.setup.prior is None else self.setup.prior.state()
        order, seen = self.setup.order.state(), [a.gates.state() for a in self.setup.attachments]
        return Moment(self.generator.get_state(), order, prior, rng.capture(), seen)

    def undo(self, before: Moment) -> None:
        """As if the step had not begun."""
        self.generator.set_state(before.generator)
        self.setup.order.restore(before.order)
        if self.setup.prior is not None:
            self.setup.prior.restore(before.prior)
        rng.restore(before.random)
        for attachment, kept in zip(self.setup.attachments, before.gates, strict=True):
            attachment.gates.restore(kept)
        self.open_gates.step()
        self._clear_gradients()

    def prepare(self) -> None:
        """Learning rates and gates of the step to come."""
        fraction = (self.step - self.start) / (self.config.steps - self.start)
        plan = gates.plan(self.config, self.start)
        begins = self.step == plan.calibrated_from
        penalty = self.config.gate_penalty if self.share > self.target else 0.0
        gates.set_gates(self.setup.attachments, fraction, self.target, penalty, begins)
        if begins:
            self.open_gates.calibration.clear()
        if self.step == plan.frozen_from:
            self._freeze()
        factor = self.config.rate_factor(self.step, self.start)
        gate_rate = 0.0
        if self.gates_learn and self.step < plan.frozen_from:
            gate_rate = self.config.gate_rate(self.start) * self.config.gate_rate_factor(
                self.step, self.start
            )
        for group, known in self._groups():
            group["lr"] = gate_rate if known.is_gate else known.rate * known.factor * factor

    def _groups(self) -> Iterator[tuple[dict[str, Any], optim.Group]]:
        """The optimisers' groups with what they are."""
        found = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        return zip(found, self.groups, strict=True)

    def _freeze(self) -> None:
        """The gates' values become fixed, in what trains and in its average; the adapter trains on."""
        for decisions in self.decisions:
            decisions.freeze()
        if self.averaging.averages:
            gate = {id(p) for group in self.groups if group.is_gate for p in group.parameters}
            for parameter, average in zip(self.parameters, self.averaging.averages, strict=True):
                if id(parameter) in gate:
                    average.copy_(parameter.detach())

    def _clear_gradients(self) -> None:
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)

    def gradients(self, cancelled: Callable[[], bool] | None) -> tuple[float, float, float]:
        """Gradients of the step in the parameters; the loss, the target's power, the gradients' norm.

        cancelled: asked before each batch; KeyboardInterrupt where it says so in any process.
        """
        self._clear_gradients()
        batches = self.draw()
        total, power = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        taught, kept = sum(not batch.preserves for batch in batches), None
        for batch in batches:
            if self.world.any(cancelled is not None and cancelled(), self.device):
                raise KeyboardInterrupt
            share = batch.weight if batch.preserves else batch.weight / self.config.accumulation
            with ExitStack() as around:
                for attachment in self.setup.attachments:
                    around.enter_context(attachment.folded_together())
                loss, target = self.loss(batch)
                scaled = loss if share == 1 else loss * share
                amplified = scaled if self.scaler is None else self.scaler.scale(scaled)
                amplified.backward()
            if batch.preserves:  # what is told of a step is how well the concept is learned
                kept = loss.detach()
                continue
            total += scaled.detach()
            power += target / taught
        if self.scaler is not None:
            for optimiser in self.optimisers:
                self.scaler.unscale_(optimiser)
        self._exchange_gradients()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip or math.inf)
        total, power = self.world.mean([total, power])
        self.preserved = None if kept is None else float(self.world.mean([kept])[0])
        found = torch.stack([total.double(), power.double(), norm.to(self.device).double()]).tolist()
        return found[0], found[1], found[2]

    def draw(self) -> list[Batch]:
        """This process's rows of the next step's batches."""
        batches = draw(self.setup, self.config, self.generator, self.world.size)
        batches += draw_preserved(self.setup, self.config, self.step, self.world.size)
        return [batch.rows(self.world.rows(len(batch.indices))) for batch in batches]

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch's loss with the gates' penalty, and its target's power."""
        with self.autocast():
            loss, power = batch_loss(self.setup, batch, self.config)
        return loss + sum(a.gates.penalty() for a in self.setup.attachments), power

    def autocast(self) -> AbstractContextManager[object]:
        dtype = DTYPES.get(self.config.precision)
        return full_precision(self.device) if dtype is None else torch.autocast(self.device.type, dtype)

    def compared_gates(self) -> tuple[float, float] | None:
        """The loss with adaptive gates and with the same frozen; see :func:`.gate_parameters.compared`."""
        with self.autocast():
            return compared(self.setup, self.config, self.decisions)

    def _exchange_gradients(self) -> None:
        if self.world.size > 1:
            seen = [p for p in self.parameters if p.grad is not None]
            means = self.world.mean([p.grad for p in seen if p.grad is not None])
            for parameter, mean in zip(seen, means, strict=True):
                parameter.grad = mean

    def update(self) -> None:
        """Let the optimisers step, and close the step."""
        self.whole = False
        for optimiser in self.optimisers:
            if self.scaler is None:
                optimiser.step()
            else:
                self.scaler.step(optimiser)
        if self.scaler is not None:
            self.scaler.update()
        self._count_and_steer()
        self.step += 1
        self.averaging.update(self.step)
        for attachment in self.setup.attachments:
            if self.world.size > 1:
                attachment.gates.average(self.world.mean)
            attachment.gates.end_step()
        self.whole = True

    def _count_and_steer(self) -> None:
        """Count the step's open gates (from the calibration on all together, too), and lead their share to
        its target."""
        self.opened = self.open_gates.step(by_level=True)
        if self.opened and self.world.size > 1:
            (mean,) = self.world.mean([torch.tensor(list(self.opened.values()), device=self.device)])
            self.opened = dict(zip(self.opened, mean.tolist(), strict=True))
        if self.opened:
            now, weight = (
                self.open_gates.share(self.opened),
                gates.SMOOTHED / (self.config.steps - self.start),
            )
            self.share += (now - self.share) * min(1.0, weight)
        plan = gates.plan(self.config, self.start)
        if self.step >= plan.calibrated_from:
            self.open_gates.calibrate(self.opened)
        if self.step < plan.frozen_from and self.target and self.opened:
            self._steer(is_hard=self.step >= plan.hard_from)

    def _steer(self, is_hard: bool) -> None:
        """Lead the share of open gates to its target; closing them is the penalty's while they are soft."""
        found = logit_above(self.target, [x for a in self.setup.attachments for x in a.gates.logits or ()])
        if self.world.size > 1:
            found = self.world.mean([torch.tensor(found, device=self.device)])[0].item()
        gain = min(1.0, gates.SMOOTHED / (self.config.steps - self.start))
        for decisions in self.decisions:
            decisions.shift(-gain * (found if is_hard else min(found, 0.0)))

    def rates(self) -> dict[str, float]:
        """Group -> learning rate before its factor; prodigy's with its own estimate."""
        return {
            known.label: group["lr"] / known.factor * float(group.get("d", 1.0))
            for group, known in self._groups()
        }

    # --- going wrong ----------------------------------------------------------------------------------

    def culprit(self, before: Moment) -> str:
        """Where a step whose loss or gradient is not finite went wrong: its batches run again and are looked
        at. ``", in …"`` or nothing."""
        bad_gradients = divergence.bad_tensors((name, p.grad) for name, p in self.named)
        self.undo(before)
        if bad := divergence.bad_tensors((name, p.detach()) for name, p in self.named):
            return f", in {bad[0]}"
        modules = [item for a in self.setup.attachments for item in a.modules()]
        for batch in self.draw():
            found = divergence.first_bad_layer(modules, lambda b=batch: self.loss(b))  # type: ignore[misc]
            if found is not None:
                return f", first in layer {found}"
        return f", in the gradient of {bad_gradients[0]}" if bad_gradients else ""

    # --- the state ------------------------------------------------------------------------------------

    def state(self) -> State:
        """Everything that later steps depend on."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        values = {"step": self.step, "start": self.start, "scaler": scaler}
        values["calibration"] = self.open_gates.calibration
        values["share"] = self.share
        found = State({"noise": self.generator.get_state()}, values)
        found.put("parameters", state.pack_parameters(self.named, self.parameters))
        if self.averaging.averages:
            found.put("averages", state.pack_parameters(self.named, self.averaging.averages))
        for i, optimiser in enumerate(self.optimisers):
            found.put(f"optimiser{i}", checkpoint.pack_optimiser(optimiser))
        found.put("gates", state.pack_gates(self.setup.attachments))
        found.put("order", state.pack_order(self.setup.order))
        if self.setup.prior is not None:
            found.put("prior", state.pack_order(self.setup.prior))
        found.put("random", state.pack_random(rng.capture()))
        return found

    def restore(self, found: State) -> None:
        """Take over a :meth:`state` of the same run."""
        saved = state.unpack_parameters(self.named, found.part("parameters"))
        with torch.no_grad():
            for parameter, value in zip(self.parameters, saved, strict=True):
                parameter.copy_(value)
        if self.averaging.averages:
            self.averaging.averages = state.unpack_parameters(self.named, found.part("averages"))
        for i, optimiser in enumerate(self.optimisers):
            checkpoint.unpack_optimiser(optimiser, found.part(f"optimiser{i}"))
        state.unpack_gates(self.setup.attachments, found.part("gates"))
        state.unpack_order(self.setup.order, found.part("order"))
        if self.setup.prior is not None:
            state.unpack_order(self.setup.prior, found.part("prior"))
        self.generator.set_state(found.tensors["noise"])
        rng.restore(state.unpack_random(found.part("random")))
        self.step, self.start = int(found.values["step"]), int(found.values["start"])
        self.share = float(found.values["share"])
        calibration = found.values["calibration"].items()
        self.open_gates.calibration = {name: (v[0], v[1], v[2]) for name, v in calibration}
        if self.scaler is not None:
            self.scaler.load_state_dict(found.values["scaler"])


def _scaler(device: torch.device) -> Any:
    """Loss scaling for float16, whose small gradients would vanish."""
    made = getattr(torch.amp, "GradScaler", None)
    if made is None:
        raise SpectralAdapterError(
            f"precision 'fp16': torch {torch.__version__} has no gradient scaler for {device.type}; use bf16"
        )
    return made(device.type)
