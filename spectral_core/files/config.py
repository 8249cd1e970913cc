"""The entry ``spectral_adapters.config`` of a file: everything about an adapter but its tensors, as one JSON.

``configurations`` lists each distinct method configuration once; ``layers`` gives every layer's shape, its
terms as numbers in that list, and their weights where one is not 1. Reading checks every word and number.
A layer's shape is stored because a basis alone does not tell a convolution's kernel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..adapter.adapter import Adapter, Provenance
from ..adapter.schedule import Schedule
from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape
from ..methods import MethodConfig, config_from_dict, config_to_dict
from ..names.layer_name import LayerName, check_glob
from .container import is_count, strict_json

TOKENS_PART = "tokens"
MOST_TOKENS = 1000
MOST_STRENGTHS = 1000  # of ``layer_strengths``
_KEYS = (
    "configurations",
    "layers",
    "strength",
    "layer_strengths",
    "schedule",
    "provenance",
    "tokens",
    "compact_seed",
)


@dataclass(frozen=True)
class TermPlan:
    """One term without its tensors."""

    config: MethodConfig
    weight: float


@dataclass(frozen=True)
class LayerPlan:
    shape: LayerShape
    terms: tuple[TermPlan, ...]


@dataclass(frozen=True)
class FileConfig:
    """An adapter without its tensors. ``tokens``: (word, parts that have an embedding of it).

    ``compact_seed``: of the projections that stand for Spectral R's bases; None where the bases are stored.
    """

    layers: Mapping[str, LayerPlan]
    strength: float = 1.0
    layer_strengths: tuple[tuple[str, float], ...] = ()
    schedule: Schedule | None = None
    provenance: Provenance = Provenance()  # noqa: RUF009  (frozen)
    tokens: tuple[tuple[str, tuple[str, ...]], ...] = ()
    compact_seed: int | None = None


def of_adapter(adapter: Adapter, compact_seed: int | None) -> FileConfig:
    """What the file says about an adapter."""
    layers = {
        name: LayerPlan(layer.shape, tuple(TermPlan(t.config, float(t.weight)) for t in layer.terms))
        for name, layer in adapter.layers.items()
    }
    return FileConfig(
        layers,
        float(adapter.strength),
        adapter.layer_strengths,
        adapter.schedule,
        adapter.provenance,
        tuple((word, tuple(parts)) for word, parts in adapter.tokens.items()),
        compact_seed,
    )


def to_json(config: FileConfig) -> str:
    """The entry's text. Raises where provenance holds what JSON cannot, or a number is not finite."""
    table: dict[str, int] = {}
    layers = {}
    for name, layer in config.layers.items():
        words = [json.dumps(config_to_dict(term.config), sort_keys=True) for term in layer.terms]
        entry: dict[str, Any] = {
            "shape": list(layer.shape.weight_shape),
            "terms": [table.setdefault(word, len(table)) for word in words],
        }
        if any(term.weight != 1 for term in layer.terms):
            entry["weights"] = [term.weight for term in layer.terms]
        layers[name] = entry
    provenance = config.provenance
    values = {
        "configurations": [json.loads(word) for word in table],
        "layers": layers,
        "strength": config.strength,
        "layer_strengths": [list(pair) for pair in config.layer_strengths],
        "schedule": None if config.schedule is None else [list(point) for point in config.schedule.points],
        "provenance": {field: getattr(provenance, field) for field in Provenance.__dataclass_fields__},
        "tokens": [{"token": word, "parts": list(parts)} for word, parts in config.tokens],
        "compact_seed": config.compact_seed,
    }
    try:
        return json.dumps(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise SpectralAdapterError(
            f"the adapter's provenance or strengths cannot be written as JSON ({error}); expected words, "
            "finite numbers, lists and tables"
        ) from error


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"found a {type(value).__name__}: {value!r:.60}")


def from_json(text: str) -> FileConfig:
    """The checked entry. Raises SpectralAdapterError that names the place, without the file."""
    values = strict_json(text)
    _expect(isinstance(values, dict), "the configuration", values, "a table")
    if set(values) != set(_KEYS):
        odd = sorted(set(values) ^ set(_KEYS))
        raise SpectralAdapterError(f"the configuration has missing or unknown entries: {', '.join(odd[:5])}")
    _expect(isinstance(values["configurations"], list), "configurations", values["configurations"], "a list")
    configs = [_method_config(entry) for entry in values["configurations"]]
    _expect(isinstance(values["layers"], dict), "layers", values["layers"], "a table")
    layers = {name: _layer(name, entry, configs) for name, entry in values["layers"].items()}
    _expect(_is_number(values["strength"]), "strength", values["strength"], "a number")
    seed = values["compact_seed"]
    _expect(seed is None or is_count(seed), "compact_seed", seed, "nothing or a whole number")
    return FileConfig(
        layers,
        float(values["strength"]),
        _strengths(values["layer_strengths"]),
        _schedule(values["schedule"]),
        _provenance(values["provenance"]),
        _tokens(values["tokens"]),
        seed,
    )


def _expect(is_right: bool, place: str, found: object, expected: str) -> None:
    if not is_right:
        raise SpectralAdapterError(f"{place}: found {found!r:.80}, expected {expected}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _method_config(entry: object) -> MethodConfig:
    is_table = isinstance(entry, dict) and isinstance(entry.get("method"), str)
    _expect(is_table, "a method configuration", entry, "a table with the method's name")
    assert isinstance(entry, dict)
    for setting, value in entry.items():
        is_plain = value is None or isinstance(value, str | bool | int | float)
        is_list = isinstance(value, list) and all(map(is_count, value))
        _expect(is_plain or is_list, f"setting {setting!r}", value, "a word, a number or a list of indices")
    config = config_from_dict(entry)
    yes_or_no = [each.name for each in fields(config) if each.type in ("bool", bool)]
    for setting in yes_or_no:
        value = getattr(config, setting)
        _expect(isinstance(value, bool), f"setting {setting!r} of {config.method}", value, "true or false")
    return config


def check_name(name: str) -> LayerName:
    """A layer's name taken apart, refused where it would be mistaken for a trained token's."""
    parsed = LayerName.parse(name)
    if parsed.part == TOKENS_PART:
        raise SpectralAdapterError(f"layer {name}: the part {TOKENS_PART!r} is kept for trained tokens")
    return parsed


def _layer(name: str, entry: object, configs: list[MethodConfig]) -> LayerPlan:
    """One layer's plan; the rank must fit the shape where the method takes singular columns."""
    _expect(len(name) <= 1000, "a layer's name", name, "at most 1000 letters")
    rows = check_name(name).rows
    is_table = isinstance(entry, dict) and {"shape", "terms"} <= set(entry) <= {"shape", "terms", "weights"}
    _expect(is_table, f"layer {name}", entry, "shape, terms and perhaps weights")
    assert isinstance(entry, dict)
    sizes, terms = entry["shape"], entry["terms"]
    is_shape = (
        isinstance(sizes, list) and 2 <= len(sizes) <= 5 and all(is_count(n, 2**31) and n > 0 for n in sizes)
    )
    _expect(is_shape, f"layer {name}: shape", sizes, "2 to 5 whole numbers of at least 1")
    are_terms = isinstance(terms, list) and terms and all(is_count(i, len(configs) - 1) for i in terms)
    _expect(bool(are_terms), f"layer {name}: terms", terms, f"numbers of the {len(configs)} configurations")
    weights = entry.get("weights", [1.0] * len(terms))
    are_weights = isinstance(weights, list) and len(weights) == len(terms) and all(map(_is_number, weights))
    _expect(are_weights, f"layer {name}: weights", weights, f"{len(terms)} numbers")
    shape = LayerShape(sizes[0], sizes[1], tuple(sizes[2:]))
    _expect(
        rows is None or rows[1] - rows[0] == sizes[0], f"layer {name}: shape", sizes, "its rows' count first"
    )
    plan = LayerPlan(
        shape, tuple(TermPlan(configs[i], float(w)) for i, w in zip(terms, weights, strict=True))
    )
    for term in plan.terms:
        largest = max(term.config.singular_columns, default=-1)
        if largest >= shape.max_rank:
            raise SpectralAdapterError(
                f"layer {name} ({shape}): singular column {largest} of {shape.max_rank}"
            )
    return plan


def _pairs(value: object, place: str, first: type[str] | type[float]) -> list[Any]:
    _expect(isinstance(value, list), place, value, "a list of pairs")
    assert isinstance(value, list)
    for pair in value:
        is_pair = isinstance(pair, list) and len(pair) == 2 and _is_number(pair[1])
        is_first = is_pair and (isinstance(pair[0], str) if first is str else _is_number(pair[0]))
        _expect(is_first, place, pair, "a pair")
    return value


def _strengths(value: object) -> tuple[tuple[str, float], ...]:
    pairs = _pairs(value, "layer_strengths", str)
    is_few = len(pairs) <= MOST_STRENGTHS
    _expect(is_few, "layer_strengths", f"{len(pairs)} entries", f"at most {MOST_STRENGTHS}")
    for pattern, _ in pairs:
        check_glob(pattern, "layer_strengths")
    return tuple((pattern, float(multiplier)) for pattern, multiplier in pairs)


def _schedule(value: object) -> Schedule | None:
    if value is None:
        return None
    return Schedule(tuple((float(p), float(m)) for p, m in _pairs(value, "schedule", float)))


def _provenance(value: object) -> Provenance:
    _expect(isinstance(value, dict), "provenance", value, "a table")
    assert isinstance(value, dict)
    kinds = {
        "name": str,
        "family": str,
        "base": dict,
        "trigger_words": list,
        "training": dict,
        "parents": list,
    }
    _expect(set(value) == set(kinds), "provenance", sorted(value), f"exactly {', '.join(kinds)}")
    for field, kind in kinds.items():
        _expect(isinstance(value[field], kind), f"provenance: {field}", value[field], f"a {kind.__name__}")
    _expect(
        all(isinstance(w, str) for w in value["trigger_words"]),
        "trigger_words",
        value["trigger_words"],
        "words",
    )
    _expect(all(isinstance(p, dict) for p in value["parents"]), "parents", value["parents"], "tables")
    return Provenance(
        value["name"],
        value["family"],
        value["base"],
        tuple(value["trigger_words"]),
        value["training"],
        tuple(value["parents"]),
    )


def _tokens(value: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    _expect(isinstance(value, list), "tokens", value, "a list")
    assert isinstance(value, list)
    _expect(len(value) <= MOST_TOKENS, "tokens", f"{len(value)} entries", f"at most {MOST_TOKENS}")
    found: dict[str, tuple[str, ...]] = {}
    for entry in value:
        is_table = isinstance(entry, dict) and set(entry) == {"token", "parts"}
        _expect(is_table, "a token", entry, "token and parts")
        word, parts = entry["token"], entry["parts"]
        is_word = isinstance(word, str) and word != "" and word not in found
        _expect(is_word, "a token's word", word, "a word that occurs once")
        are_parts = isinstance(parts, list) and parts and all(isinstance(p, str) and p for p in parts)
        _expect(
            bool(are_parts) and len(set(parts)) == len(parts),
            f"token {word!r}: parts",
            parts,
            "distinct parts",
        )
        found[word] = tuple(parts)
    return tuple(found.items())
