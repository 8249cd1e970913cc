"""What the adapted layers see while a pipeline draws: activations for crosstalk and retention.

Shapes: per layer (rows, fan_in), a token or, for a convolution, an unfolded patch per row; at most ``rows``
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..maths.layers import Geometry, LayerShape
from ..names.layer_name import LayerName
from ..names.spellings import path_spellings
from ..statistics.collect import patches
from .loading import parts_of


@contextmanager
def recorded_inputs(
    pipe: Any, layers: Sequence[str], rows: int = 512, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Layer name -> a seeded random sample of its inputs, filled when the block ends.

    Every call of a layer adds a few rows, so that all noise levels of a generation are represented.
    """
    modules = parts_of(pipe)
    samples: dict[str, list[Tensor]] = {name: [] for name in layers}
    generator = torch.Generator().manual_seed(seed)
    handles = []
    found: dict[str, Tensor] = {}
    try:
        for name in layers:
            parsed = LayerName.parse(name)
            inside = dict(modules[parsed.part].named_modules())
            module = next(inside[path] for path in path_spellings(parsed.path) if path in inside)
            handles.append(module.register_forward_pre_hook(_recorder(samples[name], generator)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, parts in samples.items():
        if parts:
            seen = torch.cat(parts)
            found[name] = seen[torch.randperm(len(seen), generator=generator)[:rows]]


def _recorder(
    into: list[Tensor], generator: torch.Generator, per_call: int = 64
) -> Callable[[nn.Module, Any], None]:
    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        weight = module.weight
        assert isinstance(weight, Tensor)
        flat = patches(x, LayerShape.of(weight).kernel, Geometry.of(module))
        chosen = torch.randint(0, len(flat), (per_call,), generator=generator)
        into.append(flat[chosen.to(flat.device)].float().cpu())

    return record
