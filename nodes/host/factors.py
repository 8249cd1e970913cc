"""The folded factors of an adapter's layers in float32 on the CPU: computed once per layer, kept while it
lives.

Weight patches and the forward path take the same tensors, so that a new strength, a new run or the other
mode folds nothing again.

Shapes: down (R, in, *kernel), up (out, R) with the scale in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...spectral_core.adapter import AdapterLayer, Term
from ...spectral_core.lowrank import concatenate
from ...spectral_core.methods import method_of

# For the whole process on purpose: nodes are executed again and again with the same adapter, and an entry
# goes when its layer does.
_KEPT: WeakKeyDictionary[AdapterLayer, dict[object, tuple[Tensor, Tensor]]] = WeakKeyDictionary()
_DIGESTS: WeakKeyDictionary[AdapterLayer, str] = WeakKeyDictionary()


def is_linear(term: Term) -> bool:
    """Whether ΔW is proportional to the strength."""
    return getattr(term.config, "strength_law", "delta") == "delta"


def folded(layer: AdapterLayer, terms: Sequence[int], strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """(up, down) of the sum of the terms with these indices, of adaptive gates with every row open.

    strength matters to terms whose ΔW is not proportional to it, and is 1 for all others.
    """
    kept = _KEPT.setdefault(layer, {})
    key = (tuple(terms), strength)
    if key not in kept:
        if strength != 1.0:  # one strength at a time
            for other in [k for k in kept if k[0] == key[0]]:  # type: ignore[index]
                del kept[other]
        kept[key] = _fold(layer, [layer.terms[i] for i in terms], strength)
    return kept[key]


def _fold(layer: AdapterLayer, terms: Sequence[Term], strength: float) -> tuple[Tensor, Tensor]:
    # A tensor born in inference mode could never take part in training, and the kept ones outlive the node.
    with torch.inference_mode(False), torch.no_grad():
        parts = []
        for term in terms:
            params = {name: value.detach().to("cpu") for name, value in term.params.items()}
            method = method_of(term.config)
            parts.append(method.fold(term.config, layer.shape, params, strength * term.weight))
        factors = concatenate(parts)
        return _plain(factors.scaled_up()), _plain(factors.down)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor.contiguous()


def digest(layer: AdapterLayer) -> str:
    """The layer's content hash, computed once."""
    if layer not in _DIGESTS:
        _DIGESTS[layer] = layer.content_hash
    return _DIGESTS[layer]
