"""A layer's terms as factors that a forward pass can use: folded, cast once, kept while nothing changes.

Strength scales ΔW, so it stays out of what is kept: a new strength or progress folds nothing again. The
exception is Spectral R with ``strength_law="rotation"``, whose factors depend on it.

Shapes: down (R, in, *kernel), up (out, R).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapter.adapter import AdapterLayer, Term
from ..maths.compiling import is_compiling
from ..maths.layers import LayerShape
from ..maths.lowrank import Factors, check_usable, concatenate
from ..maths.precision import full_precision
from ..methods import Fold, fold_many, method_of

Ready = tuple[Tensor, Tensor, Mapping[str, Tensor]]
"""down (R, in, *kernel), up (out, R) with the scale in it, and the gate's tensors, on the device of the
input."""


@dataclass(eq=False)
class Piece:
    """Terms that act through one pair of factors; a term with an adaptive gate is a piece of its own.

    trained: the terms hold leaf tensors that an optimiser changes. given: their factors at strength 1, while
    :func:`folded_together` lasts.
    """

    most_kept: ClassVar[int] = 2  # folded factors: of one (device, dtype) in use, and of one before

    shape: LayerShape
    terms: tuple[Term, ...]
    gate_name: str
    trained: bool = False
    given: Factors | None = None
    name: str = ""
    _cache: dict[Any, Ready] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.gated = not self.terms[0].mergeable
        self.linear = all(term.config.is_linear for term in self.terms)

    def ready(self, device: torch.device, dtype: torch.dtype, strength: float) -> Ready:
        """down, up and the gate's tensors of strength · ΔW; folded once, or each time where they are trained.

        Each time, and not once per step, unless somebody says where a step begins and ends: a graph that two
        backward passes share is gone after the first, and torch's fused optimisers change a tensor without
        counting up its version.
        """
        if self.trained:
            return self.fold(device, dtype, strength)
        key = (device, dtype, strength)
        found = self._cache.get(key)
        if found is not None:
            return found
        # The decorator would do the same, and import the compiler with this module: a second of everyone's.
        keep = torch.compiler.disable(self._keep) if is_compiling() else self._keep
        kept: Ready = keep(key, device, dtype, strength)
        return kept

    def _keep(self, key: object, device: torch.device, dtype: torch.dtype, strength: float) -> Ready:
        """Fold once and keep it; a compiled model breaks its graph here once, and traces no fold."""
        if len(self._cache) >= self.most_kept:
            self.release()
        # An inference tensor could not be saved for a later backward pass, so none is ever kept.
        with torch.inference_mode(False), torch.no_grad():
            down, up, gate = self.fold(device, dtype, strength)
            self._check(down, up)
            kept = _plain(down), _plain(up), {k: _plain(v) for k, v in gate.items()}
        self._cache[key] = kept
        return kept

    def _check(self, down: Tensor, up: Tensor) -> None:
        """Once, on what the forward pass computes with."""
        place = f"layer {self.name}" if self.name else "a layer"
        check_usable(Factors(down, up), f"{place}: applied live in {down.dtype}")

    def release(self) -> None:
        """Keep nothing of what was folded; it is folded again when it is used."""
        self._cache.clear()

    def fold(self, device: torch.device, dtype: torch.dtype, strength: float) -> Ready:
        """The factors in float32 or better, and the one cast to the precision of the forward pass."""
        if self.given is not None and strength == 1.0:
            factors = self.given
        else:
            with full_precision(device):
                factors = concatenate([self._folded(term, device, strength) for term in self.terms])
        down, up = factors.down.to(device, dtype), factors.scaled_up().to(device, dtype)
        return down, up, _on(device, self.terms[0].params) if self.gated else {}

    def _folded(self, term: Term, device: torch.device, strength: float) -> Factors:
        params = _on(device, term.params)
        return method_of(term.config).fold(*fold_of(term, self.shape, params, strength))


def _on(device: torch.device, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A term's tensors, which are all on one device."""
    if next(iter(params.values())).device == device:
        return params
    return {name: value.to(device) for name, value in params.items()}


def fold_of(term: Term, shape: LayerShape, params: Mapping[str, Tensor], strength: float) -> Fold:
    return Fold(term.config, shape, params, strength * term.weight)


@contextmanager
def folded_together(pieces: Iterable[Piece]) -> Iterator[None]:
    """Inside, the trained pieces are folded already, the like of all layers in few operations: for one
    forward pass and its backward, between which no parameter may change."""
    ready = [piece for piece in pieces if piece.trained and piece.linear]
    folds = [fold_of(term, piece.shape, term.params, 1.0) for piece in ready for term in piece.terms]
    devices = {next(iter(fold.params.values())).device.type for fold in folds}  # a fold's are all on one
    with ExitStack() as around:
        for kind in devices:
            around.enter_context(full_precision(torch.device(kind)))
        factors = iter(fold_many(folds))
    for piece in ready:
        piece.given = concatenate([next(factors) for _ in piece.terms])
    try:
        yield
    finally:
        for piece in ready:
            piece.given = None


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, detached, and alone in its storage: both factors may be views of one."""
    shares = tensor.untyped_storage().nbytes() != tensor.nbytes
    if shares or tensor.is_inference():
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensor.detach().contiguous()


def pieces_of(name: str, layer: AdapterLayer, trained: bool) -> tuple[Piece, ...]:
    """One piece for all terms whose ΔW is fixed and linear in the strength, one for each other term."""
    together = [t for t in layer.terms if t.mergeable and t.config.is_linear]
    pieces = [Piece(layer.shape, tuple(together), "", trained, name=name)] if together else []
    alone = [(i, t) for i, t in enumerate(layer.terms) if all(t is not other for other in together)]
    pieces += [Piece(layer.shape, (t,), term_name(name, i), trained, name=name) for i, t in alone]
    return tuple(pieces)


def term_name(layer: str, index: int) -> str:
    """A term's name beside its layer's: the same for the first, numbered for the others."""
    return layer if index == 0 else f"{layer}#{index}"
