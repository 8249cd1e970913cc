"""Several adapters composed in the space of predictions, as FouRA composes sliders (arXiv 2406.08798):

    ε(x_t)  =  ε₀(x_t) + Σ sᵢ·(εᵢ(x_t) − ε₀(x_t)),   εᵢ with adapter i alone, ε₀ with none

No adapter sees what another one does, whatever they share; K adapters cost K + 1 calls of the model per step
instead of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from ..adapter.adapter import Adapter
from ..errors import SpectralAdapterError
from .applying import Applied, apply
from .loading import parts_of


@contextmanager
def composed(
    pipe: Any, adapters: Sequence[Adapter], weights: Sequence[float] | None = None
) -> Iterator[None]:
    """The adapters act on the pipeline inside the block, each at its own strength; weights are the sᵢ, 1 by
    default.

    Adapters of text encoders and trained words act as :func:`.applying.apply` makes them. Raises
    SpectralAdapterError for adapters that do not fit.
    """
    weights = [1.0] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters) or not adapters:
        raise SpectralAdapterError(
            f"{len(weights)} weights for {len(adapters)} adapters: expected one for each"
        )
    modules = parts_of(pipe)
    denoiser = modules.get("unet", modules.get("transformer"))
    if denoiser is None:
        raise SpectralAdapterError("this pipeline has no denoiser that adapters could be composed on")
    with ExitStack() as undo:
        sets = [undo.enter_context(apply(pipe, adapter)) for adapter in adapters]
        original, had_own = denoiser.forward, "forward" in vars(denoiser)

        def forward(sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            _only(sets, None)
            result = original(sample, timestep, *args, **kwargs)
            base = result[0]
            total = base.clone()
            for chosen, weight in zip(sets, weights, strict=True):
                if weight:
                    _only(sets, chosen)
                    total += weight * (original(sample, timestep, *args, **kwargs)[0] - base)
            if isinstance(result, tuple):
                return (total, *result[1:])
            result.sample = total
            return result

        def restore() -> None:
            _only(sets, *sets)
            if had_own:
                denoiser.forward = original
            else:
                vars(denoiser).pop("forward", None)

        undo.callback(restore)
        denoiser.forward = forward
        yield


def _only(sets: Sequence[Applied], *chosen: Applied | None) -> None:
    """Of the denoiser's attachments those of the chosen sets act; text encoders are left as they are."""
    for applied in sets:
        for attachment in applied.attachments:
            name = next((name for name, _ in attachment.modules()), "")
            if not name.startswith("text_encoder"):
                attachment.set_strength(1.0 if any(applied is c for c in chosen) else 0.0)
