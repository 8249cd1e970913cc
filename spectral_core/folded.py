"""A layer's terms as factors that a forward pass can use: folded, cast once, kept while nothing changes.

Strength scales ΔW, so it stays out of what is kept: a new strength or progress folds nothing again. The
exception is Spectral R with ``strength_law="rotation"``, whose factors depend on it.

Shapes: down (R, in, *kernel), up (out, R).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .adapter import AdapterLayer, Term
from .layers import LayerShape
from .lowrank import Factors, concatenate
from .methods import method_of

_KEPT = 2  # folded factors kept per piece: of one (device, dtype) in use, and of one before

Ready = tuple[Tensor, Tensor, dict[str, Tensor]]
"""down (R, in, *kernel), up (out, R) with the scale in it, and the gate's tensors, on the device of the
input."""


@dataclass(eq=False)
class Piece:
    """Terms that act through one pair of factors; a term with an adaptive gate is a piece of its own.

    trained: the terms hold leaf tensors that an optimiser changes.
    """

    shape: LayerShape
    terms: tuple[Term, ...]
    gate_name: str
    trained: bool = False
    _cache: dict[Any, Ready] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.gated = not self.terms[0].mergeable
        alone = self.terms[0].config if len(self.terms) == 1 else None
        self.frozen_columns: int = getattr(alone, "frozen_columns", 0)  # of up, the last ones: never trained
        self._tied: str = getattr(alone, "tied_rows", "")
        self.linear = all(getattr(t.config, "strength_law", "delta") == "delta" for t in self.terms)

    def ready(self, device: torch.device, dtype: torch.dtype, strength: float) -> Ready:
        """down, up and the gate's tensors of strength · ΔW; folded once, or each time where they are trained.

        Each time, and not once per step: a graph that two backward passes share is gone after the first, and
        torch's fused optimisers change a tensor without counting up its version.
        """
        if self.trained:
            return self._fold(device, dtype, strength)
        key = (device, dtype, strength)
        found = self._cache.get(key)
        return self._keep(key, device, dtype, strength) if found is None else found

    def tie(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """(R/2,): what the second half of ``down`` is to the first in all that is trained; None for no such
        thing."""
        return self.terms[0].params[self._tied].to(device, dtype) if self._tied else None

    @torch.compiler.disable
    def _keep(self, key: object, device: torch.device, dtype: torch.dtype, strength: float) -> Ready:
        """Fold once and keep it; a compiled model breaks its graph here once, and traces no fold."""
        if len(self._cache) >= _KEPT:
            self._cache.clear()
        # An inference tensor could not be saved for a later backward pass, so none is ever kept.
        with torch.inference_mode(False), torch.no_grad():
            down, up, gate = self._fold(device, dtype, strength)
            kept = _plain(down), _plain(up), {k: _plain(v) for k, v in gate.items()}
        self._cache[key] = kept
        return kept

    def _fold(self, device: torch.device, dtype: torch.dtype, strength: float) -> Ready:
        """The factors in float32 or better, and the one cast to the precision of the forward pass."""
        params = [{k: v.to(device) for k, v in t.params.items()} for t in self.terms]
        if torch.is_autocast_enabled(device.type):  # it would fold in half precision
            with torch.autocast(device.type, enabled=False):
                factors = self._factors(params, strength)
        else:
            factors = self._factors(params, strength)
        return factors.down.to(dtype), factors.scaled_up().to(dtype), params[0] if self.gated else {}

    def _factors(self, params: list[dict[str, Tensor]], strength: float) -> Factors:
        pairs = zip(self.terms, params, strict=True)
        return concatenate(
            [method_of(t.config).fold(t.config, self.shape, p, strength * t.weight) for t, p in pairs]
        )


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, detached, and alone in its storage: both factors may be views of one."""
    shares = tensor.untyped_storage().nbytes() != tensor.nbytes
    if shares or tensor.is_inference():
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensor.detach().contiguous()


def pieces_of(name: str, layer: AdapterLayer, trained: bool) -> tuple[Piece, ...]:
    """One piece for all terms whose ΔW is fixed and linear in the strength, one for each other term."""
    together = [
        t for t in layer.terms if t.mergeable and getattr(t.config, "strength_law", "delta") == "delta"
    ]
    pieces = [Piece(layer.shape, tuple(together), "", trained)] if together else []
    alone = [(i, t) for i, t in enumerate(layer.terms) if all(t is not other for other in together)]
    pieces += [Piece(layer.shape, (t,), term_name(name, i), trained) for i, t in alone]
    return tuple(pieces)


def term_name(layer: str, index: int) -> str:
    """A term's name beside its layer's: the same for the first, numbered for the others."""
    return layer if index == 0 else f"{layer}#{index}"
