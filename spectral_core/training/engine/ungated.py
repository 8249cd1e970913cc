"""An adapter without gates of the same effective rank, trained like the one with gates: what they are worth.

It is the same adapter from the same start, on the same pictures with the same noise, but every layer has a
fixed mask: of its rows the first, as many as were open on average. Rows behind closed gates take no part, so
this is an adapter of that rank. Afterwards everything is as before.

Shapes: any float32 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ..config.config import TrainConfig
from ..objectives.losses import Setup
from ..runs import rng
from ..runs.distributed import World
from .gate_parameters import loss_of_some
from .stepper import Stepper


def ungated_loss(
    setup: Setup,
    config: TrainConfig,
    method: str,
    world: World,
    start: Sequence[Tensor],
    ranks: Mapping[str, float],
    cancelled: Callable[[], bool] | None,
) -> float | None:
    """The loss of :func:`.gate_parameters.loss_of_some` after as many steps; None where it was cancelled.

    start: the values of all parameters before the first step. ranks: open gates by layer.
    """
    with ExitStack() as around:
        around.enter_context(rng.undisturbed())
        for order in (setup.order, setup.prior):
            if order is not None:
                around.callback(order.restore, order.state())
        for attachment in setup.attachments:
            around.callback(attachment.gates.restore, attachment.gates.state())
            around.callback(setattr, attachment.gates, "recorder", attachment.gates.recorder)
            attachment.gates.recorder = None
        stepper = Stepper(setup, config, method, world, gates_learn=False)
        kept = [p.detach().clone() for p in stepper.parameters]
        around.callback(_put, stepper.parameters, kept)
        _put(stepper.parameters, start)
        for one in stepper.decisions:
            one.keep_rows(ranks)
        try:
            while stepper.step < config.steps:
                stepper.prepare()
                stepper.gradients(cancelled)
                stepper.update()
        except KeyboardInterrupt:
            return None
        stepper.averaging.apply()
        with stepper.autocast():
            return loss_of_some(setup, config)


@torch.no_grad()
def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
