"""Gradient checkpointing on any tree of modules: activations are computed again in backward instead of kept.

``full`` checkpoints every block, ``selective`` the transformer blocks only, or every second block of a model
that has no others. With frozen weights a backward pass costs about as much as a forward pass. Measured on SD
1.5's UNet (16×16 latents, batch 1, float32, two CPU cores, FouRA of rank 8 on the attention layers):

    none       1.00 of the bytes kept for backward, 1.00 of the time
    selective  0.31, 1.27
    full       0.16, 1.52

Residual blocks keep little and their convolutions are dear, transformer blocks keep much: their wide
feed-forward layers. Results do not change: the same operations run on the same numbers.

Shapes: the modules' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...errors import SpectralAdapterError

# Class names, as the diffusion libraries, transformers and ComfyUI spell them.
TRANSFORMER = re.compile(r"(\w*Transformer|DiT|Joint|DoubleStream|SingleStream)Block|\w*EncoderLayer")
RESIDUAL = re.compile(r"ResnetBlock\w*|ResBlock|ResidualBlock")

Around = Callable[[], AbstractContextManager[Any]]


def modules_for(root: nn.Module, mode: str) -> list[tuple[str, nn.Module]]:
    """The outermost modules that a mode checkpoints; SpectralAdapterError where the tree has none."""
    if mode == "none":
        return []
    found: list[tuple[str, nn.Module]] = []
    for name, module in root.named_modules():
        kind = type(module).__name__
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if name and not inside and (TRANSFORMER.fullmatch(kind) or RESIDUAL.fullmatch(kind)):
            found.append((name, module))
    if not found:
        raise SpectralAdapterError(
            f"checkpointing {mode!r}: {type(root).__name__} has no blocks that are known here; use 'none'"
        )
    if mode == "full":
        return found
    chosen = [(name, module) for name, module in found if TRANSFORMER.fullmatch(type(module).__name__)]
    return chosen if 0 < len(chosen) < len(found) else found[::2]


@contextmanager
def checkpointed(roots: Iterable[nn.Module], mode: str, again: Around = nullcontext) -> Iterator[int]:
    """Checkpoint the modules of these trees inside the block; gives how many. Afterwards they are as before.

    again: makes a context for each pass that runs once more.
    """
    with ExitStack() as undo:
        count = 0
        for root in roots:
            for _, module in modules_for(root, mode):
                undo.callback(_wrap(module, again))
                count += 1
        yield count


def _wrap(module: nn.Module, again: Around) -> Callable[[], None]:
    own = vars(module).get("forward")
    forward = module.forward
    # Random numbers inside are put back for the second pass only where the module is in training mode.
    saving = partial(
        checkpoint,
        forward,
        use_reentrant=False,
        preserve_rng_state=module.training,
        context_fn=lambda: (nullcontext(), again()),
    )

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return saving(*args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    module.forward = wrapped  # type: ignore[method-assign]

    def restore() -> None:
        if own is not None:
            module.forward = own
        else:
            vars(module).pop("forward", None)

    return restore
