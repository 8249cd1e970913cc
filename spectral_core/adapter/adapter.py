"""Adapter: layer name -> method tensors, with configuration, provenance, strengths and a schedule.

Adapters are immutable values: every operation returns a new one that shares the tensors. A layer's name is
``<part>.<path>``: part ``unet``, ``text_encoder`` or ``text_encoder_2`` (or any other word without a dot),
path the module's path in that part, with ``[start:stop]`` behind it where only those output rows of a
fused weight are meant.

Shapes: each layer knows its own; a layer may carry several terms, whose updates add up (fused gated
adapters).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Generator, Tensor

from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape
from ..maths.lowrank import Factors, concatenate
from ..maths.svd import Columns, select_columns
from ..methods import Basis, MethodConfig, config_to_dict, method_of
from ..names.layer_name import LayerName, matches
from .schedule import Schedule

MOST_STRENGTH = 1e6  # far above any use; what is computed with it stays finite


class _Value:
    """A value that nobody changes: a copy of it is itself."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


@dataclass(frozen=True, eq=False, repr=False)
class Term(_Value):
    """One update of a layer: a method's configuration, its tensors, and a weight that multiplies it."""

    config: MethodConfig
    params: Mapping[str, Tensor]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not getattr(self.params, "is_immutable", False):  # such as one that reads a file when asked
            object.__setattr__(self, "params", MappingProxyType(dict(self.params)))
        _check_strength(self.weight, "weight of a term")

    def __repr__(self) -> str:
        return f"Term({self.config!r}, weight={self.weight:g})"

    @property
    def mergeable(self) -> bool:
        return self.config.adaptive_gate is None

    def factors(self, shape: LayerShape, strength: float = 1.0) -> Factors:
        """Exact factors of strength · weight · ΔW; of an adaptive gate, with every row open."""
        return method_of(self.config).fold(self.config, shape, self.params, strength * self.weight)


@dataclass(frozen=True, eq=False, repr=False)
class AdapterLayer(_Value):
    """What an adapter does to one layer: the sum of its terms."""

    shape: LayerShape
    terms: tuple[Term, ...]

    def __repr__(self) -> str:
        return f"AdapterLayer({self.shape}: {_counted(str(term.config) for term in self.terms)})"

    @property
    def mergeable(self) -> bool:
        return all(term.mergeable for term in self.terms)

    def factors(self, strength: float = 1.0) -> Factors:
        """Exact factors of the whole layer, concatenated over its terms; refused for an adaptive gate."""
        if not self.mergeable:
            raise SpectralAdapterError(
                "an adaptive gate has no fixed ΔW: freeze the adapter first (its gates' mean openings are "
                "kept in it), or apply it live"
            )
        return concatenate([term.factors(self.shape, strength) for term in self.terms])

    @property
    def content_hash(self) -> str:
        """SHA-256 over shape, configurations, weights and tensors."""
        digest = hashlib.sha256(repr(self.shape.weight_shape).encode())
        for term in self.terms:
            settings = sorted((k, _plain(v)) for k, v in config_to_dict(term.config).items())
            digest.update(repr((settings, float(term.weight), len(term.params))).encode())
            for key in sorted(term.params):
                _hash_tensor(digest, key, term.params[key])
        return digest.hexdigest()


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from; everything JSON-able. ``base`` is a fingerprint (:mod:`.fingerprint`) or
    empty."""

    name: str = ""
    family: str = ""
    base: Mapping[str, Any] = field(default_factory=dict)
    trigger_words: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[Mapping[str, Any], ...] = ()

    @property
    def frozen_gates(self) -> str:
        """What the training measured of freezing its adaptive gates, in words; empty where it did not."""
        loss, frozen = self.training.get("gates_loss"), self.training.get("gates_loss_frozen")
        if not (isinstance(loss, float) and isinstance(frozen, float) and 0 < loss < frozen * 1e6):
            return ""
        return f"measured in training: loss {loss:.4f}, frozen {frozen:.4f} ({frozen / loss - 1:+.1%})"


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(_Value):
    """layers by name; strength · Π matching layer_strengths · schedule(progress) scales every ΔW.

    ``layer_strengths`` are (glob pattern, multiplier) pairs on layer names: ``("text_encoder*", 0.5)``.
    ``tokens`` are trained words: token -> part -> embedding rows (k, dim).
    """

    layers: Mapping[str, AdapterLayer]
    provenance: Provenance = Provenance()
    strength: float = 1.0
    layer_strengths: tuple[tuple[str, float], ...] = ()
    schedule: Schedule | None = None
    tokens: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    is_spectral_adapter = True  # told by this, not by class: a process may hold two copies of this package

    def __post_init__(self) -> None:
        for name in self.layers:
            LayerName.parse(name)
        _check_strength(self.strength, "strength")
        for pattern, multiplier in self.layer_strengths:
            _check_strength(multiplier, f"strength of the layers {pattern!r:.80}")
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(
            self, "tokens", MappingProxyType({t: MappingProxyType(dict(p)) for t, p in self.tokens.items()})
        )

    def __repr__(self) -> str:
        terms = (t.config.method for layer in self.layers.values() for t in layer.terms)
        more = [f"strength={self.strength:g}"] if self.strength != 1 else []
        more += [f"scaled in {len(self.layer_strengths)} patterns"] if self.layer_strengths else []
        more += ["scheduled"] if self.schedule else []
        more += [f"words {' '.join(self.tokens)}"] if self.tokens else []
        said = [f"{len(self.layers)} layers", _counted(terms), *more]
        return f"Adapter({self.provenance.name!r}: {', '.join(said)})"

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(LayerName.parse(name).part for name in self.layers))

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t.config.method for layer in self.layers.values() for t in layer.terms))

    @property
    def mergeable(self) -> bool:
        """Whether plain weights can hold it: no adaptive gate and no schedule."""
        return self.schedule is None and all(layer.mergeable for layer in self.layers.values())

    @property
    def parameter_count(self) -> int:
        """Trained numbers, the stored basis not counted."""
        return sum(
            term.params[name].numel()
            for layer in self.layers.values()
            for term in layer.terms
            for name in method_of(term.config).trainable(term.config)
        )

    @property
    def content_hash(self) -> str:
        """SHA-256 over layers, tokens and strengths: equal content, equal hash, in any process and on any
        device.

        Provenance is left out: it says where the numbers come from, not what they do.
        """
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            digest.update(f"{name}={self.layers[name].content_hash};".encode())
        for token in sorted(self.tokens):
            for part in sorted(self.tokens[token]):
                _hash_tensor(digest, repr((token, part)), self.tokens[token][part])
        points = self.schedule and tuple((float(p), float(m)) for p, m in self.schedule.points)
        multipliers = tuple((pattern, float(m)) for pattern, m in self.layer_strengths)
        digest.update(repr((float(self.strength), multipliers, points)).encode())
        return digest.hexdigest()

    def strength_of(self, name: str) -> float:
        """strength · Π of the layer_strengths whose pattern matches; the schedule not included."""
        value = self.strength
        for pattern, multiplier in self.layer_strengths:
            if matches(name, pattern):
                value *= multiplier
        _check_strength(value, f"layer {name}: its strength, all multipliers together,")
        return value

    def scaled(self, strength: float) -> Adapter:
        """The same adapter, ``strength`` times as strong.

        >>> Adapter({}, Provenance("vase")).scaled(0.5).scaled(0.5).strength
        0.25
        """
        _check_strength(strength, "strength")
        return replace(self, strength=self.strength * strength)

    def with_layer_strength(self, pattern: str, multiplier: float) -> Adapter:
        """Layers whose name fits the glob scaled by ``multiplier``; a pattern that fits none is refused."""
        _check_strength(multiplier, f"strength of the layers {pattern!r}")
        self._require_match(pattern)
        return replace(self, layer_strengths=(*self.layer_strengths, (pattern, multiplier)))

    def _require_match(self, pattern: str) -> None:
        if not any(matches(name, pattern) for name in self.layers):
            raise SpectralAdapterError(
                f"no layer matches {pattern!r}: this adapter has layers such as "
                f"{', '.join(list(self.layers)[:3]) or '(none)'}"
            )

    def with_schedule(self, schedule: Schedule | None) -> Adapter:
        return replace(self, schedule=schedule)

    def with_provenance(self, **changes: Any) -> Adapter:
        return replace(self, provenance=replace(self.provenance, **changes))

    def only(self, patterns: str | Iterable[str]) -> Adapter:
        """The layers whose name fits any of the globs; a pattern that fits none is refused."""
        wanted = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        for pattern in wanted:
            self._require_match(pattern)
        return replace(
            self, layers={n: v for n, v in self.layers.items() if any(matches(n, p) for p in wanted)}
        )

    def map_terms(self, change: Callable[[str, Term], Term]) -> Adapter:
        """A new adapter with every term replaced by ``change(layer name, term)``."""
        layers = {
            name: replace(layer, terms=tuple(change(name, term) for term in layer.terms))
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)


def _plain(value: Any) -> Any:
    """Numbers that are equal print the same: 8 and 8.0."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _check_strength(value: object, what: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or abs(value) > MOST_STRENGTH:  # type: ignore[arg-type]
        raise SpectralAdapterError(
            f"{what} is {value!r:.40}: expected a finite number, at most {MOST_STRENGTH:g} either way"
        )


def _counted(words: Iterable[str]) -> str:
    """``foura ×128, lora``."""
    return ", ".join(f"{word} ×{n}" if n > 1 else word for word, n in Counter(words).items()) or "empty"


def require_adapter(value: object, what: str = "") -> None:
    """Refuse what is no adapter; told by an attribute, as a process may hold two copies of this package."""
    if not getattr(value, "is_spectral_adapter", False):
        raise SpectralAdapterError(
            f"{what or 'input'} is a {type(value).__name__}: expected an adapter; open files with load() or "
            "import_lora() first"
        )


def _hash_tensor(digest: Any, key: str, tensor: Tensor) -> None:
    value = tensor.detach().cpu().contiguous()
    digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy())


def create(
    weights: Mapping[str, Tensor],
    config: MethodConfig,
    basis_of: Callable[[str, Tensor], Basis] | None = None,
    generator: Generator | None = None,
    provenance: Provenance = Provenance(),
) -> Adapter:
    """A new adapter with ΔW = 0 on the layers whose pretrained weights are given.

    weights: layer name -> weight (out, in, *kernel), as :func:`..attach.targets.find_targets` gives them.
    basis_of(name, weight) -> U, S, V of ``config.columns`` for the spectral methods, such as one that asks
    :class:`..maths.svd_cache.SVDCache`; without it they are computed. Raises SpectralAdapterError with the
    layer's name where it does not fit.

    >>> import torch
    >>> from spectral_core import FouRAConfig, create
    >>> create({"unet.to_q": torch.randn(8, 6)}, FouRAConfig(rank=2))
    Adapter('': 1 layers, foura)
    """
    method = method_of(config)
    if not isinstance(weights, Mapping) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise SpectralAdapterError(
            f"weights are {type(weights).__name__}: expected a mapping of layer names to tensors, as "
            "find_targets() gives it"
        )
    layers = {}
    for name, weight in weights.items():
        shape = LayerShape.of(weight)
        try:
            basis = None
            if method.needs_basis:
                basis = _columns(config, weight) if basis_of is None else basis_of(name, weight)
            params = method.init(config, shape, basis, generator)
        except SpectralAdapterError as error:
            raise SpectralAdapterError(f"layer {name} ({shape}): {error}") from error
        layers[name] = AdapterLayer(shape, (Term(config, params),))
    return Adapter(layers, provenance)


def _columns(config: MethodConfig, weight: Tensor) -> Basis:
    found = select_columns(weight, Columns.listed(config.singular_columns))
    return found.u, found.s, found.v
