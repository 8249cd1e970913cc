"""What is done to the gates' parameters besides the optimiser: their share is led to its target, they are
frozen, and both ways of using them are compared.

Steering: a penalty closes gates while they are soft and more than ρ are open. All biases move together by

    b ← b − gain · q,  q the logit that a share ρ of the step's gates is above

a step, gain = 20 / steps; only upwards while the gates are soft. So the share of open gates does not stay
below ρ and ends there, whatever the model.

Freezing: W₂ = 0 and b = ±10 make a gate's value a constant, whatever the input: the mask E[p] > ½.

Shapes: bias (rank,), W₂ (rank, hidden), E[p] (rank,).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...attach.attaching import Attachment
from ...gates import formula
from ..config.config import TrainConfig
from ..objectives.losses import Setup, evaluation_loss
from ..runs import rng
from .gates import not_counted

DECIDED = 10.0  # logit of a frozen gate: σ(±10 / 0.5) is 0 or 1 to 2e-9
COMPARED_LEVELS = 4  # noise levels of the comparison
MOST_COMPARED = 16  # pictures
COMPARED_WORK = 0.01  # of the run's


class GateParameters:
    """The gates' parameters of one attachment, by layer."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._layers: dict[str, dict[str, nn.Parameter]] = {}
        for path, parameter in attachment.named_parameters():
            if name := formula.trained_tensor(path):
                layer = path.removesuffix(f".gate.{name}")
                self._layers.setdefault(layer, {})[name] = parameter
        self.budget = _budget(attachment) if self._layers else 0.0

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def shift(self, change: float) -> None:
        """Add a number to the logits of all gates."""
        for parameters in self._layers.values():
            parameters.get("entropy_shift", parameters["bias"]).add_(change)

    def freeze(self) -> None:
        """Every gate keeps the value that E[p] > ½ says, from here on."""
        for layer in self._layers:
            if (mean_open := self._attachment.gates.mean_open(layer)) is not None:
                self._fix(layer, formula.freeze(mean_open, self.budget))

    def keep_rows(self, ranks: Mapping[str, float]) -> None:
        """Every layer keeps its first rows, as many as this mean rank says, at least one."""
        for layer, parameters in self._layers.items():
            mask = torch.zeros_like(parameters["bias"])
            mask[: max(1, round(ranks.get(layer, 0.0)))] = 1.0
            self._fix(layer, mask)

    @torch.no_grad()
    def _fix(self, layer: str, mask: Tensor) -> None:
        parameters, decided = self._layers[layer], (2 * mask - 1) * DECIDED
        parameters["w2"].zero_()
        parameters["bias"].copy_(decided)
        if "entropy_scale" in parameters:
            parameters["entropy_scale"].zero_()
            parameters["entropy_shift"].copy_(decided)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Frozen inside the block; afterwards as before, to the bit."""
        parameters = [p for layer in self._layers.values() for p in layer.values()]
        kept = [p.detach().clone() for p in parameters]
        try:
            self.freeze()
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)


def _budget(attachment: Attachment) -> float:
    """The share of gates that the adapter keeps open by itself, 0 for none."""
    terms = [term for layer in attachment.to_adapter().layers.values() for term in layer.terms]
    return max(gate.budget for term in terms if (gate := term.config.adaptive_gate) is not None)


def logit_above(share: float, logits: Sequence[Tensor]) -> float:
    """q: this share of all gates has logits above it (+inf: open in any case); 0, which moves nothing, where
    more than that are open in any case."""
    ordered = torch.cat([each.float().cpu() for each in logits]).sort(descending=True).values
    place = min(max(round(share * len(ordered)), 1), len(ordered) - 1)
    above, below = float(ordered[place - 1]), float(ordered[place])
    if not math.isfinite(below):
        return 0.0
    return (above + below) / 2 if math.isfinite(above) else below


def compared(
    setup: Setup, config: TrainConfig, decisions: Sequence[GateParameters]
) -> tuple[float, float] | None:
    """The loss with adaptive and with frozen gates, on the pictures of :func:`loss_of_some`; None without
    gates."""
    if not any(len(one) for one in decisions):
        return None
    adaptive = loss_of_some(setup, config)
    with ExitStack() as around:
        for one in decisions:
            around.enter_context(one.frozen())
        return adaptive, loss_of_some(setup, config)


@torch.no_grad()
def loss_of_some(setup: Setup, config: TrainConfig) -> float:
    """The loss over some training pictures at fixed noise levels, always with the same noise, gates hard. It
    takes about 1 % of the run's work."""
    work = COMPARED_WORK * 3 * config.steps * config.batch_size * config.accumulation
    count = min(max(1, int(work / COMPARED_LEVELS)), MOST_COMPARED, len(setup.latents))
    some: Tensor | Sequence[Tensor] = setup.latents[:count]
    with ExitStack() as around:
        around.enter_context(rng.undisturbed())
        around.enter_context(not_counted(setup.attachments))
        for attachment in setup.attachments:
            around.enter_context(attachment.gates.inference())
            around.enter_context(attachment.folded_together())
        few = replace(setup, latents=some)
        return evaluation_loss(few, levels=COMPARED_LEVELS, batch_size=min(config.batch_size, 16))
