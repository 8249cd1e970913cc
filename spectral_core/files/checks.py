"""What an adapter's file must hold: the tensors that its configuration promises, of the right shapes and
values.

Shapes: those of each method's ``tensor_shapes``; tokens (k, dim).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape
from ..methods import method_of
from . import compact as compact_form
from . import config as file_config
from .config import FileConfig, TermPlan
from .container import SafeFile

STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def prefix(name: str, k: int, count: int) -> str:
    """What stands before the names of a term's tensors."""
    return f"{name}." if count == 1 else f"{name}.term{k}."


def token_key(part: str, index: int) -> str:
    """The tensor of the index-th token's embedding in a part."""
    return f"{file_config.TOKENS_PART}.{part}.{index}"


def is_compact(config: FileConfig, term: TermPlan) -> bool:
    """Whether the file holds projections of this term's basis instead of the basis."""
    return config.compact_seed is not None and compact_form.applies(term.config)


def term_shapes(config: FileConfig, shape: LayerShape, term: TermPlan) -> dict[str, tuple[int, ...]]:
    """Every tensor that the file holds for a term -> its shape."""
    shapes = method_of(term.config).tensor_shapes(term.config, shape)
    return compact_form.tensor_shapes(shapes) if is_compact(config, term) else shapes


def expected_tensors(path: Path, config: FileConfig) -> dict[str, tuple[int | None, ...]]:
    """Every tensor that the configuration promises -> its shape; None for a size that any number may have."""
    expected: dict[str, tuple[int | None, ...]] = {}
    for name, plan in config.layers.items():
        for k, term in enumerate(plan.terms):
            start = prefix(name, k, len(plan.terms))
            for key, shape in term_shapes(config, plan.shape, term).items():
                if start + key in expected:
                    raise SpectralAdapterError(
                        f"{path}: layer {name}: tensor {start + key} belongs to two layers"
                    )
                expected[start + key] = shape
    for i, (_, parts) in enumerate(config.tokens):
        expected |= {token_key(part, i): (None, None) for part in parts}
    return expected


def check_names(file: SafeFile, expected: Mapping[str, Any]) -> None:
    """The promised tensors and no others."""
    if missing := [key for key in expected if key not in file.entries]:
        raise SpectralAdapterError(
            f"{file.path}: tensor {missing[0]!r} is missing{_more(missing)}: the file is damaged or edited"
        )
    if unknown := [key for key in file.entries if key not in expected]:
        raise SpectralAdapterError(
            f"{file.path}: tensor {unknown[0]!r} belongs to no layer of the configuration{_more(unknown)}: "
            "the file is damaged or edited"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def check_entry(file: SafeFile, key: str, expected: tuple[int | None, ...]) -> None:
    """One tensor's shape and dtype, from the header."""
    entry = file.entries[key]
    fits = len(entry.shape) == len(expected) and all(
        e is None or e == n for e, n in zip(expected, entry.shape, strict=True)
    )
    if not fits:
        wanted = tuple("any" if e is None else e for e in expected)
        raise SpectralAdapterError(f"{file.path}: tensor {key}: shape {entry.shape}, expected {wanted}")
    if entry.dtype not in STORED:
        names = ", ".join(str(d).removeprefix("torch.") for d in STORED)
        raise SpectralAdapterError(f"{file.path}: tensor {key}: dtype {entry.dtype}, expected one of {names}")


def check_term(place: str, config: Any, shape: LayerShape, params: Mapping[str, Tensor]) -> None:
    """What is saved must be what the method says a layer carries."""
    expected = method_of(config).tensor_shapes(config, shape)
    found = {key: tuple(value.shape) for key, value in params.items()}
    if found != expected:
        odd = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        raise SpectralAdapterError(
            f"{place} ({shape}): tensor {odd[0]}: shape {found.get(odd[0])}, expected {expected.get(odd[0])}"
        )


def check_values(place: str, key: str, value: Tensor) -> None:
    """Numbers that mean something: finite, masks 0 or 1, mean openings 0 … 1, singular values ≥ 0."""
    if value.dtype not in STORED or value.is_meta:
        raise SpectralAdapterError(
            f"{place}: dtype {value.dtype} on {value.device}: expected floating-point values"
        )
    bad = int(value.numel() - torch.isfinite(value).sum())
    if bad:
        raise SpectralAdapterError(
            f"{place}: {bad} of {value.numel()} values are NaN or infinite, expected finite numbers: the "
            "training failed, or the chosen dtype is too narrow"
        )
    ends = key.rsplit(".", 1)[-1]
    is_gate = key.rsplit(".", 2)[-2:-1] == ["gate"]
    if is_gate and ends == "mask" and not bool(((value == 0) | (value == 1)).all()):
        raise SpectralAdapterError(f"{place}: expected only 0 (closed) and 1 (open)")
    if is_gate and ends == "mean_open" and not bool(((value >= 0) & (value <= 1)).all()):
        raise SpectralAdapterError(f"{place}: expected mean openings between 0 and 1")
    if ends == "s" and not bool((value >= 0).all()):
        raise SpectralAdapterError(f"{place}: expected singular values of at least 0")
