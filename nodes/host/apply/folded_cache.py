"""The folded factors of an adapter's layers in float32 on the CPU: computed once per layer, kept while it
lives.

Weight patches and the forward path take the same tensors, so that a new strength, a new run or the other
mode folds nothing again.

Shapes: down (R, in, *kernel), up (out, R) with the scale in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ....spectral_core.adapter.adapter import AdapterLayer, Term
from ....spectral_core.attach.factors import Piece, Ready, pieces_of
from ....spectral_core.maths.lowrank import check_usable, concatenate
from ....spectral_core.methods import method_of
from ..files.reread import set_down

# For the whole process on purpose: nodes are executed again and again with the same adapter, and an entry
# goes when its layer does.
_KEPT: WeakKeyDictionary[AdapterLayer, dict[object, tuple[Tensor, Tensor]]] = WeakKeyDictionary()
_DIGESTS: WeakKeyDictionary[AdapterLayer, str] = WeakKeyDictionary()


def folded(
    name: str, layer: AdapterLayer, terms: Sequence[int], strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(up, down) of the sum of the terms with these indices, of adaptive gates with every row open.

    strength matters to terms whose ΔW is not proportional to it, and is 1 for all others. Raises
    SpectralAdapterError, with the layer's name and its factors' norms, for numbers that are not usable.
    """
    kept = _KEPT.setdefault(layer, {})
    key = (tuple(terms), strength)
    if key not in kept:
        if strength != 1.0:  # one strength at a time
            for other in [k for k in kept if k[0] == key[0]]:  # type: ignore[index]
                del kept[other]
        kept[key] = _fold(name, layer, [layer.terms[i] for i in terms], strength)
    return kept[key]


def _fold(name: str, layer: AdapterLayer, terms: Sequence[Term], strength: float) -> tuple[Tensor, Tensor]:
    # A tensor born in inference mode could never take part in training, and the kept ones outlive the node.
    with torch.inference_mode(False), torch.no_grad():
        parts = []
        for term in terms:
            params = {key: value.detach().to("cpu") for key, value in term.params.items()}
            method = method_of(term.config)
            parts.append(method.fold(term.config, layer.shape, params, strength * term.weight))
        factors = check_usable(concatenate(parts), f"layer {name}")
        folded_ = _plain(factors.scaled_up()), _plain(factors.down)
    for term in terms:
        if term.config.is_linear:  # another one is folded again for every strength
            set_down(term)
    return folded_


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous and alone in its memory: both factors of a layer may have been computed as one."""
    shares = tensor.untyped_storage().nbytes() != tensor.nbytes
    if shares or tensor.is_inference():
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


def digest(layer: AdapterLayer) -> str:
    """The layer's content hash, computed once."""
    if layer not in _DIGESTS:
        _DIGESTS[layer] = layer.content_hash
    return _DIGESTS[layer]


@dataclass(eq=False)
class KeptPiece(Piece):
    """A piece that is cast from the process-wide float32 factors instead of folded."""

    layer: AdapterLayer | None = None
    indices: tuple[int, ...] = ()

    most_kept: ClassVar[int] = 1  # where nothing is to be cast, it is the kept factors themselves

    def fold(self, device: torch.device, dtype: torch.dtype, strength: float) -> Ready:
        """The kept factors, cast."""
        up, down = self._masters(strength)
        gate = {name: value.to(device) for name, value in self._gate.items()}
        return down.to(device, dtype), up.to(device, dtype), gate

    def _masters(self, strength: float) -> tuple[Tensor, Tensor]:
        assert self.layer is not None
        return folded(self.name, self.layer, self.indices, 1.0 if self.linear else strength)

    @property
    def _gate(self) -> dict[str, Tensor]:
        params = self.terms[0].params
        return {k: params[k] for k in params if k.startswith("gate.")} if self.gated else {}

    def nbytes(self, dtype: torch.dtype, strength: float) -> int:
        """What it takes on the computing device."""
        numbers = sum(factor.numel() for factor in self._masters(strength))
        return numbers * dtype.itemsize + 4 * sum(value.numel() for value in self._gate.values())


def kept_pieces(name: str, layer: AdapterLayer) -> tuple[KeptPiece, ...]:
    """The core's pieces of a layer, each with its place in the kept factors."""
    found = []
    for piece in pieces_of(name, layer, trained=False):
        indices = tuple(i for i, term in enumerate(layer.terms) if any(term is t for t in piece.terms))
        kept = KeptPiece(piece.shape, piece.terms, piece.gate_name, name=name, layer=layer, indices=indices)
        found.append(kept)
    return tuple(found)
