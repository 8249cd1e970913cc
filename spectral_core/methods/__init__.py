"""The methods, one file each, all with the same few pure functions.

A method is a frozen configuration, the tensors that a layer carries, their initial values, and ``fold``: the
exact low-rank factors of ΔW. Merge, forward path, training and export all call ``fold``, so a formula exists
once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Generator, Tensor

from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape
from ..maths.lowrank import Factors
from ..words import expected
from . import foura, lora, orthogonal, spectral_a, spectral_r
from .common import AdaptiveGate, Fold, FoldMany, MethodConfig, one_by_one, together
from .foura import FouRAConfig
from .lora import LoRAConfig
from .orthogonal import OrthogonalConfig
from .spectral_a import SpectralAConfig
from .spectral_r import SpectralRConfig

__all__ = [
    "METHODS",
    "AdaptiveGate",
    "Basis",
    "Fold",
    "FouRAConfig",
    "LoRAConfig",
    "Method",
    "MethodConfig",
    "OrthogonalConfig",
    "Params",
    "SpectralAConfig",
    "SpectralRConfig",
    "config_from_dict",
    "config_to_dict",
    "fold_many",
    "method_of",
    "with_setting",
]

Params = Mapping[str, Tensor]
Basis = tuple[Tensor, Tensor, Tensor]
"""U (out, r), S (r,), V (fan_in, r): the chosen singular columns of the pretrained weight."""


@dataclass(frozen=True)
class Method:
    """One method's functions; ``config`` is the first argument of each.

    A method is a file with a :class:`.common.MethodConfig` and these functions, and its row in ``METHODS``;
    ``fold_many`` and ``freeze`` only where it has something to do there.

    =====================================  ==================================================================
    tensor_shapes(config, shape)           every tensor a layer carries -> its shape; the file reader's check
    trainable(config)                      the names of those that training changes
    init(config, shape, basis, generator)  initial float32 tensors, ΔW = 0; a basis only where needs_basis
    fold(config, shape, params, strength)  exact Factors of strength·ΔW with every gate open, differentiable
    fold_many(folds)                       the same for many layers, in fewer operations where it can be
    freeze(config, params)                 both with an adaptive gate fixed as it was on average
    reach(config, params)                  how far ΔW goes for a step of 1, by tensor, where it is not about 1
    =====================================  ==================================================================
    """

    name: str
    config: type[Any]
    needs_basis: bool
    tensor_shapes: Callable[[Any, LayerShape], dict[str, tuple[int, ...]]]
    trainable: Callable[[Any], tuple[str, ...]]
    init: Callable[[Any, LayerShape, Basis | None, Generator | None], dict[str, Tensor]]
    fold: Callable[[Any, LayerShape, Params, float], Factors]
    fold_many: FoldMany
    freeze: Callable[[Any, Params], tuple[Any, dict[str, Tensor]]]
    reach: Callable[[Any, Params], dict[str, float]]


def _method(module: Any, config: type[Any], needs_basis: bool) -> Method:
    return Method(
        config.method,
        config,
        needs_basis,
        module.tensor_shapes,
        module.trainable,
        module.init,
        module.fold,
        getattr(module, "fold_many", None) or one_by_one(module.fold),
        getattr(module, "freeze", None) or _unchanged,
        getattr(module, "reach", None) or _about_one,
    )


def _unchanged(config: MethodConfig, params: Params) -> tuple[MethodConfig, dict[str, Tensor]]:
    return config, dict(params)


def _about_one(config: MethodConfig, params: Params) -> dict[str, float]:
    return {}


METHODS: dict[str, Method] = {
    "foura": _method(foura, FouRAConfig, needs_basis=False),
    "spectral_a": _method(spectral_a, SpectralAConfig, needs_basis=True),
    "spectral_r": _method(spectral_r, SpectralRConfig, needs_basis=True),
    "lora": _method(lora, LoRAConfig, needs_basis=False),
    "orthogonal": _method(orthogonal, OrthogonalConfig, needs_basis=False),
}


def method_of(config: MethodConfig) -> Method:
    """The functions that belong to a configuration."""
    try:
        return METHODS[config.method]
    except (AttributeError, KeyError) as error:
        raise SpectralAdapterError(
            f"expected a method's configuration, such as FouRAConfig(rank=8), found {config!r:.80}"
        ) from error


def with_setting(name: str) -> tuple[str, ...]:
    """The methods whose configuration has a setting of this name."""
    return tuple(m.name for m in METHODS.values() if name in {field.name for field in fields(m.config)})


def fold_many(folds: Sequence[Fold]) -> list[Factors]:
    """``fold`` of every one, of whatever methods, the like of them together."""
    return together(
        folds, lambda each: each.config.method, lambda alike: method_of(alike[0].config).fold_many(alike)
    )


def config_from_dict(values: Mapping[str, Any]) -> MethodConfig:
    """A configuration from its plain dictionary (``{"method": …, …}``); unknown names are refused."""
    values = dict(values)
    name = values.pop("method", None)
    if name not in METHODS:
        raise SpectralAdapterError(f"unknown method {name!r}: {expected(name, METHODS)}")
    config = METHODS[name].config
    known = {field.name for field in fields(config)}
    if unknown := set(values) - known:
        raise SpectralAdapterError(
            f"unknown setting {min(unknown)!r} for method {name}: {expected(min(unknown), sorted(known))}"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        built: MethodConfig = config(**values)
    except TypeError as error:
        raise SpectralAdapterError(f"incomplete or mistyped settings for method {name}: {error}") from error
    return built


def config_to_dict(config: MethodConfig) -> dict[str, Any]:
    """The plain dictionary of a configuration, for files and hashes; inverse of :func:`config_from_dict`.

    A setting that came after the first files (``metadata={"later": True}``) is left out where it changes
    nothing, so that files keep their hashes and earlier versions read them.
    """
    said = [
        f for f in fields(config) if not (f.metadata.get("later") and getattr(config, f.name) == f.default)
    ]
    plain = {field.name: getattr(config, field.name) for field in said}
    return {"method": config.method} | {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
