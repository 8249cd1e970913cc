"""What can be known to be wrong before the first step is said before the first step.

Shapes: weights (out, in, *kernel) by layer name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import SpectralAdapterError
from ...gates import formula
from ...maths.layers import LayerShape
from ...methods import METHODS, MethodConfig, method_of
from ..config.config import TrainConfig
from ..data.folder import Example, left_out
from ..objectives.losses import Setup
from .optim import Group

GATE_START = formula.INITIAL_LOGIT
UNUSUAL_RATE = 100.0  # times the method's default
_NAMES_SHOWN = 3


def before_training(setup: Setup, config: TrainConfig, method: str, groups: Sequence[Group]) -> list[str]:
    """Warnings; SpectralAdapterError for what cannot work."""
    count = len(setup.latents)
    if count == 0:
        raise SpectralAdapterError("no training data: there are no latents")
    for index in range(count):
        if not bool(torch.isfinite(setup.latents[index]).all()):
            raise SpectralAdapterError(
                f"the latents of example {index} are not finite: its picture or the autoencoder is damaged "
                "(a half-precision autoencoder may overflow: use float32)"
            )
    if setup.masks is not None and len(setup.masks) != count:
        raise SpectralAdapterError(
            f"{len(setup.masks)} masks for {count} latents: expected one each, or none"
        )
    if config.weighting == "min-snr":
        setup.diffusion.min_snr_weights(setup.diffusion.levels(1), config.snr_gamma)
    if config.checkpointing != "none" and not setup.roots:
        raise SpectralAdapterError(
            f"checkpointing {config.checkpointing!r}: the set-up names no modules (roots) for it"
        )
    gated = any(group.is_gate for group in groups)
    notes = ["patience: no picture is held out, so that it does nothing"] if unjudged(setup, config) else []
    return notes + rate_warnings(config, method, groups[0].rate) + (gate_warnings(config) if gated else [])


def unjudged(setup: Setup, config: TrainConfig) -> bool:
    """Whether the run shall stop by pictures that there are none of."""
    return bool(config.patience) and not setup.held_out


def gate_warnings(config: TrainConfig) -> list[str]:
    """Gates that cannot move far enough in the steps there are."""
    rate = config.gate_rate()
    way = rate * sum(config.gate_rate_factor(step) for step in range(config.steps))
    if way >= GATE_START:
        return []
    advice = "raise gate_learning_rate" if config.gate_learning_rate else "train for more steps"
    return [
        f"the gates cannot close: they start at a logit of {GATE_START:g}, and {config.steps} steps at "
        f"gate_learning_rate {rate:.2g} move it by {way:.2g} at most; {advice}, or train without gates"
    ]


def rate_warnings(config: TrainConfig, method: str, rate: float) -> list[str]:
    """Rates far above the method's default, and a warm-up longer than the run."""
    notes = []
    usual = METHODS[method].config.learning_rate
    if config.optimiser not in ("prodigy", "sgd") and rate > UNUSUAL_RATE * usual:
        notes.append(
            f"learning_rate {rate:g} is {rate / usual:.0f} times the default of {method} ({usual:g}): the "
            "run will probably diverge"
        )
    if config.optimiser == "prodigy" and not 0.1 <= rate <= 10:
        notes.append(f"learning_rate {rate:g} with prodigy, which finds the rate itself: expected about 1")
    if config.warmup >= config.steps > 1:
        notes.append(
            f"warmup {config.warmup} of {config.steps} steps: the full learning rate is never reached"
        )
    return notes


def matched(latents: int, conditionings: int) -> list[int]:
    """Which conditioning belongs to each latent: the same number of both, or one for all."""
    if latents == 0 or conditionings == 0:
        raise SpectralAdapterError(
            f"{latents} latents and {conditionings} conditionings: expected at least one of each"
        )
    if conditionings not in (1, latents):
        raise SpectralAdapterError(
            f"{latents} latents and {conditionings} conditionings: expected as many of both, or one "
            "conditioning for all"
        )
    return [0] * latents if conditionings == 1 else list(range(latents))


def caption_warnings(examples: Sequence[Example]) -> list[str]:
    """One line where pictures have no caption file, and one where files beside them are not read."""
    folders = [folder for folder in dict.fromkeys(e.path.parent for e in examples) if folder.is_dir()]
    unread = list(dict.fromkeys(name for folder in folders for name in left_out(folder)))
    more = [f"{len(unread)} files are left out, which are not read: {_some(unread)}"] if unread else []
    missing = [e for e in examples if not e.captioned]
    if not missing:
        return more
    names = _some([e.path.name for e in missing])
    return [
        *more,
        f"{len(missing)} of {len(examples)} pictures have no caption file ({names}): they train as "
        f"{missing[0].caption!r}",
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")


def fitting(weights: Mapping[str, Tensor], config: MethodConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The layers that are large enough for the method's rank or columns, and what to say about the others.

    A spectral method cannot use columns that a layer has not, so such layers are left out; the others could
    use a rank above the layer's size, which only wastes parameters.
    """
    needs_basis = method_of(config).needs_basis
    needed = max(config.singular_columns) + 1 if needs_basis else config.rank
    small = [name for name, weight in weights.items() if LayerShape.of(weight).max_rank < needed]
    if not small:
        return dict(weights), []
    sizes = f"{small[0]} ({LayerShape.of(weights[small[0]])})"
    what = f"column {needed - 1}" if needs_basis else f"rank {needed}"
    if len(small) == len(weights):
        raise SpectralAdapterError(
            f"{what}: every layer is smaller, first {sizes}; use a lower rank or other columns"
        )
    if not needs_basis:
        return dict(weights), [
            f"{what} is above the size of {len(small)} layers, first {sizes}: a waste there"
        ]
    kept = {name: weight for name, weight in weights.items() if name not in small}
    return kept, [f"{len(small)} layers are too small for {what} and are left out, first {sizes}"]
