"""The training loop: any callable model, attached adapters, latents; nothing here knows a pipeline or a host.

    train(setup, config, method, run=Run(folder, checkpoint_every=100))

Nothing is lost: a run with a folder keeps checkpoints of everything that later steps depend on (every N
steps, at the end, when it is cancelled, after any error), and goes on from the newest, on the CPU to the last
bit.

Shapes: :mod:`..objectives.losses`.
"""

from __future__ import annotations

import torch

from ..config.config import TrainConfig
from ..objectives.losses import Denoiser, Setup, denoising_loss, evaluation_loss
from ..runs.events import Listener
from ..runs.outcome import TrainResult
from ..runs.place import Run
from .trainer import Trainer

__all__ = [
    "Denoiser",
    "Listener",
    "Setup",
    "TrainResult",
    "denoising_loss",
    "evaluation_loss",
    "train",
]


def train(
    setup: Setup,
    config: TrainConfig,
    method: str,
    listener: Listener | None = None,
    *,
    run: Run | None = None,
) -> TrainResult:
    """Train the attachments' parameters (and token rows) for ``config.steps`` steps; afterwards they hold the
    parameters to use (averaged, where the settings or the optimiser say so).

    listener: gets the ``step`` events; ``run.listener`` gets all of them (:mod:`..runs.events`).
    KeyboardInterrupt and ``run.cancel`` end the run early (``stopped``) and keep what was learned. Other
    exceptions pass on, once a checkpoint is written.

    Raises SpectralAdapterError for settings that do not fit together, before the first step; and for a loss
    that is not finite or explodes, with the step and the layer: the parameters are then the last good ones.
    """
    with torch.inference_mode(False), torch.enable_grad():  # hosts run their nodes in inference mode
        return Trainer(setup, config, method, run or Run(), listener, TrainResult()).go()
