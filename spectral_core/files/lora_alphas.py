"""Alphas of LoRA files that keep them outside their tensors: PEFT's ``adapter_config.json``, diffusers'
metadata.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import SpectralAdapterError
from .container import strict_json
from .reading import read_bytes

AlphaOf = Callable[[str, int], float | None]
"""(module's name in the file, its rank) -> alpha; None for alpha = rank."""

PEFT_PREFIX = "base_model.model."
DIFFUSERS_KEY = "lora_adapter_metadata"
MAX_BYTES = 4 << 20
_REFUSED = ("use_dora", "use_qalora", "lora_bias")


def alphas_beside(path: Path, names: Iterable[str]) -> AlphaOf | None:
    """From ``adapter_config.json`` in the file's folder; None where there is none, or where it is of another
    file: PEFT's own are called ``adapter_model`` or have its prefix in the tensors' names.
    """
    beside = path.parent / "adapter_config.json"
    is_pefts = path.stem == "adapter_model" or any(name.startswith(PEFT_PREFIX) for name in names)
    if not is_pefts or not beside.is_file():
        return None
    return _alphas(_table(read_bytes(beside, MAX_BYTES), str(beside)), str(beside))


def alphas_in_metadata(metadata: Mapping[str, str], path: Path) -> AlphaOf | None:
    """From the entry that diffusers writes: PEFT's settings of each part, their names prefixed with the
    part's.
    """
    if DIFFUSERS_KEY not in metadata:
        return None
    place = f"{path}: metadata {DIFFUSERS_KEY}"
    table = _table(metadata[DIFFUSERS_KEY], place)
    parts: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        part, _, setting = key.partition(".")
        parts.setdefault(part, {})[setting] = value
    found = {part: _alphas(settings, place) for part, settings in parts.items()}

    def alpha_of(module: str, rank: int) -> float | None:
        part, _, rest = module.partition(".")
        return found[part](rest, rank) if part in found else None

    return alpha_of


def _table(raw: bytes | str, place: str) -> dict[str, Any]:
    if len(raw) > MAX_BYTES:
        raise SpectralAdapterError(f"{place}: more than {MAX_BYTES} bytes")
    try:
        table = strict_json(raw)
    except SpectralAdapterError as error:
        raise SpectralAdapterError(f"{place}: {error}") from error
    if not isinstance(table, dict):
        raise SpectralAdapterError(f"{place}: expected a table of settings")
    return table


def _alphas(settings: Mapping[str, Any], place: str) -> AlphaOf:
    """alpha = alpha_pattern or lora_alpha, times √rank with ``use_rslora``, whose scale is alpha / √rank."""
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise SpectralAdapterError(f"{place}: peft_type {kind!r}: only LORA can be imported")
    for setting in _REFUSED:
        if settings.get(setting):
            raise SpectralAdapterError(f"{place}: {setting} is set: only plain LoRA can be imported")
    general = _number(settings.get("lora_alpha"), place)
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise SpectralAdapterError(f"{place}: alpha_pattern: expected a table")
    own = {pattern: _number(value, place) for pattern, value in patterns.items()}
    is_rooted = bool(settings.get("use_rslora"))

    def alpha_of(module: str, rank: int) -> float | None:
        path = module.removeprefix(PEFT_PREFIX)
        hits = [value for pattern, value in own.items() if _matches(pattern, path)]
        alpha = hits[0] if hits else general
        return alpha * math.sqrt(rank) if alpha is not None and is_rooted else alpha

    return alpha_of


def _matches(pattern: str, path: str) -> bool:
    """As PEFT: the pattern is the end of the path, at a dot. Read as plain words, never as a regular
    expression.
    """
    plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return path == plain or path.endswith("." + plain)


def _number(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpectralAdapterError(f"{place}: alpha {value!r:.40}: expected a number")
    return float(value)
