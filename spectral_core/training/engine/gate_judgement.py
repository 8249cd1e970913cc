"""What a run's gates became, and what their decisions are worth beside a frozen mask and no gates.

Shapes: open gates are counts 0 … rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..objectives.losses import Setup
from ..runs.outcome import GateReport
from .gates import gate_report, joined
from .stepper import Stepper


def learned(setup: Setup, stepper: Stepper) -> GateReport | None:
    """What the gates of all attachments have learned; None without any."""
    found: GateReport | None = None
    for attachment in setup.attachments:
        own = attachment.to_adapter().only([name for name, _ in attachment.modules()])
        found = joined(found, gate_report(own, stepper.open_gates))
    return found


def judged(
    found: GateReport, stepper: Stepper, compares: bool, ungated: Callable[[], float | None]
) -> GateReport:
    """The same with the share of open gates and, where the run ``compares``, the loss with the gates'
    decisions, with a frozen mask, and of what ``ungated`` trains."""
    counted = stepper.open_gates
    found = replace(
        found,
        target=stepper.target,
        share=counted.calibrated_share(),
        effective_rank=counted.effective_rank(),
    )
    if not compares or (losses := stepper.compared_gates()) is None:
        return found
    return replace(found, loss=losses[0], loss_frozen=losses[1], loss_ungated=ungated())
