"""What is done to the gates' parameters besides the optimiser: their share is led to its target, they are
frozen, and both ways of using them are compared.

Steering: the penalty closes gates while they are soft and more than ρ are open; every bias moves by

    b ← b + rate · (clip(8·(ρ − open), least, 1) + clip(1 − open gates of the layer, 0, 1))

a step, ``open`` smoothed over a twentieth of the run, least = 0 while the gates are soft and −1 once they are
hard. So the share of open gates does not stay below ρ and ends there, whatever the model, and every layer
keeps a gate on average.

Freezing: W₂ = 0 and b = ±10 make a gate's value a constant, whatever the input: the mask E[p] > ½.

Shapes: bias (rank,), W₂ (rank, hidden), E[p] (rank,).
"""

from __future__ import annotations

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

GAIN = 8.0  # a share that is an eighth off moves the biases by the gates' whole rate
DECIDED = 10.0  # logit of a frozen gate: σ(±10 / 0.5) is 0 or 1 to 2e-9
COMPARED_LEVELS = 4  # noise levels of the comparison
MOST_COMPARED = 16  # pictures
COMPARED_WORK = 0.02  # of the run's


class GateParameters:
    """The gates' parameters of one attachment, by layer."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._layers: dict[str, dict[str, nn.Parameter]] = {}
        for path, parameter in attachment.named_parameters():
            if name := formula.trained_tensor(path):
                layer = path.removesuffix(f".gate.{name}")
                self._layers.setdefault(layer, {})[name] = parameter

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def steer(
        self, share: float, opened: Mapping[str, float], target: float, rate: float, is_hard: bool
    ) -> None:
        """Move the biases from this share of open gates towards the target (0: none), after a step with these
        open gates by layer."""
        common = _clip(GAIN * (target - share), -1.0 if is_hard else 0.0) if target else 0.0
        for layer, parameters in self._layers.items():
            if layer in opened:
                bias = parameters.get("entropy_shift", parameters["bias"])
                bias.add_(rate * (common + _clip(1.0 - opened[layer], 0.0)))

    @torch.no_grad()
    def freeze(self) -> None:
        """Every gate keeps the value that E[p] > ½ says, from here on."""
        for layer, parameters in self._layers.items():
            mean_open = self._attachment.gates.mean_open(layer)
            if mean_open is None:
                continue
            decided = (2 * formula.freeze(mean_open) - 1) * DECIDED
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


def _clip(value: float, least: float) -> float:
    return min(max(value, least), 1.0)


def compared(
    setup: Setup, config: TrainConfig, decisions: Sequence[GateParameters]
) -> tuple[float, float] | None:
    """The loss with adaptive and with frozen gates, over some training pictures at fixed noise levels with
    the same noise; None without gates. It takes about 2 % of the run's work."""
    if not any(len(one) for one in decisions):
        return None
    work = COMPARED_WORK * 3 * config.steps * config.batch_size * config.accumulation
    count = min(max(1, int(work / (2 * COMPARED_LEVELS))), MOST_COMPARED, len(setup.latents))
    some: Tensor | Sequence[Tensor] = setup.latents[:count]
    few = replace(setup, latents=some)
    rows = min(config.batch_size, 16)
    with ExitStack() as around:
        around.enter_context(rng.undisturbed())
        around.enter_context(not_counted(setup.attachments))
        for attachment in setup.attachments:
            around.enter_context(attachment.gates.inference())
        adaptive = _loss(few, rows)
        for one in decisions:
            around.enter_context(one.frozen())
        return adaptive, _loss(few, rows)


@torch.no_grad()
def _loss(setup: Setup, rows: int) -> float:
    with ExitStack() as around:
        for attachment in setup.attachments:
            around.enter_context(attachment.folded_together())
        return evaluation_loss(setup, levels=COMPARED_LEVELS, batch_size=rows)
