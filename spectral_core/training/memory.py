"""Gradient checkpointing on any tree of modules: activations are computed again in backward instead of kept.

``full`` checkpoints every block (a transformer block, a residual block). ``selective`` keeps what is dear to
compute and cheap to keep; it checkpoints only the blocks' inexpensive parts (see :data:`SELECTIVE`).

With frozen weights a backward pass costs about as much as a forward pass, so computing everything again costs
a third of the step. Results do not change: the same operations run on the same numbers.

Shapes: the modules' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import SpectralAdapterError

# Class names, as the diffusion libraries and ComfyUI spell them.
FULL = re.compile(
    r"(Basic|Joint|Single|Double|Flux\w*|DiT)?_?(Transformer|Stream)?_?Block|BasicTransformerBlock|"
    r"ResnetBlock2D|ResBlock|ResnetBlock|\w*EncoderLayer|DiTBlock|\w+TransformerBlock|"
    r"(Double|Single)StreamBlock|JointBlock"
)
SELECTIVE = re.compile(r"ResnetBlock2D|ResBlock|ResnetBlock|FeedForward|\w*MLP|GEGLU")


def modules_for(root: nn.Module, mode: str) -> list[tuple[str, nn.Module]]:
    """The outermost modules that a mode checkpoints; SpectralAdapterError where the tree has none."""
    if mode == "none":
        return []
    pattern = FULL if mode == "full" else SELECTIVE
    found: list[tuple[str, nn.Module]] = []
    for name, module in root.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if name and not inside and pattern.fullmatch(type(module).__name__):
            found.append((name, module))
    if not found:
        raise SpectralAdapterError(
            f"checkpointing {mode!r}: {type(root).__name__} has no blocks that are known here; use 'none'"
        )
    return found


@contextmanager
def checkpointed(roots: Iterable[nn.Module], mode: str) -> Iterator[int]:
    """Checkpoint the modules of these trees inside the block; gives how many. Afterwards they are as
    before."""
    with ExitStack() as undo:
        count = 0
        for root in roots:
            for _, module in modules_for(root, mode):
                undo.callback(_wrap(module))
                count += 1
        yield count


def _wrap(module: nn.Module) -> Callable[[], None]:
    own = vars(module).get("forward")
    forward = module.forward
    # Random numbers inside are put back for the second pass only where the module is in training mode.
    again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=module.training)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return again(*args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    module.forward = wrapped  # type: ignore[method-assign]

    def restore() -> None:
        if own is not None:
            module.forward = own
        else:
            vars(module).pop("forward", None)

    return restore
