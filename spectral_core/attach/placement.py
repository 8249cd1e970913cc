"""Where the layers of an adapter go in a tree of modules, and which have no place there and why.

Shapes: a layer's shape must be its module's, or that of the rows that its name gives.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from torch import Tensor, nn

from ..adapter.adapter import Adapter, AdapterLayer, require_adapter
from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape
from ..names.layer_name import LayerName
from ..names.spellings import path_spellings
from ..words import OneLine
from .targets import bypassed_layers, layer_shape, modules_by_path, update_problem
from .vectors import vector_problem


@dataclass(frozen=True, repr=False)
class AttachReport(OneLine):
    """matched: names of the layers in use; unmatched and mismatched: layer name -> why it is not. tied: layer
    name -> what else has its weight, which a merge changes too, and a live adapter does not."""

    matched: tuple[str, ...] = ()
    unmatched: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> dict[str, str]:
        return self.unmatched | self.mismatched

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} layers matched, {len(self.problems)} not"]
        told = {**self.problems, **self.tied}
        return "\n".join(lines + [f"  {name}: {why}" for name, why in told.items()])


@dataclass(frozen=True)
class Placement:
    """One layer of an adapter and the module that it is for."""

    name: LayerName
    layer: AdapterLayer
    module: nn.Module

    @property
    def parameter(self) -> Tensor:
        """The weight that it changes, or the vector."""
        _, kind = self.name.vector or ("", "weight")
        return cast(Tensor, getattr(self.module, kind))


def choose_part(adapter: Adapter, part: str | None) -> str:
    """``part`` if the adapter has it; without one, its only part."""
    require_adapter(adapter)
    parts = adapter.parts
    if not parts:
        raise SpectralAdapterError("this adapter has no layers")
    if part is None and len(parts) > 1:
        raise SpectralAdapterError(
            f"this adapter has the parts {', '.join(parts)}: say which one with part=…"
        )
    if part is not None and part not in parts:
        raise SpectralAdapterError(f"this adapter has no part {part!r}: it has {', '.join(parts)}")
    return part or parts[0]


def place(
    root: nn.Module, adapter: Adapter, part: str | None, strict: bool, live: bool = True
) -> tuple[list[Placement], AttachReport]:
    """The modules for an adapter's layers. live: their forward must be called, not only their weight read.

    Raises SpectralAdapterError where no layer has a place, and with ``strict`` where any has none.
    """
    chosen = choose_part(adapter, part)
    modules = modules_by_path(root)
    bypassed = bypassed_layers(root) if live else {}
    placements: list[Placement] = []
    unmatched: dict[str, str] = {}
    mismatched: dict[str, str] = {}
    taken: dict[tuple[int, str, tuple[int, int] | None], LayerName] = {}
    for text, layer in adapter.layers.items():
        name = LayerName.parse(text)
        if name.part != chosen:
            continue
        path, vector = name.vector or (name.path, "")
        module = next((modules[p] for p in path_spellings(path) if p in modules), None)
        if module is None:
            unmatched[text] = f"no such module here{_near(path, modules)}"
        elif why := bypassed.get(id(module)) or (
            vector_problem(module, vector, live) if vector else _problem(module, layer, name.rows, live)
        ):
            unmatched[text] = why
        elif why := _shape_problem(name, layer.shape, module):
            mismatched[text] = why
        elif other := taken.get((id(module), vector, name.rows)):
            unmatched[text] = (
                f"the same module as {other}, which this adapter changes too: it can take one of the two"
            )
        else:
            taken[id(module), vector, name.rows] = name
            placements.append(Placement(name, layer, module))
    shared = tied({str(p.name): p.module for p in placements}, modules)
    report = AttachReport(tuple(str(p.name) for p in placements), unmatched, mismatched, shared)
    if not placements or (strict and report.problems):
        raise SpectralAdapterError(_refusal(report, chosen, root))
    return placements, report


def _problem(module: nn.Module, layer: AdapterLayer, rows: object, live: bool) -> str | None:
    """Why a module cannot take a layer, or these rows of it, or None."""
    if layer_shape(module) is not None and not live:
        return None
    if rows is not None and getattr(module, "groups", 1) != 1:
        return "some rows of a grouped convolution; merge the adapter"
    return update_problem(module, layer)


def tied(layers: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Of layers by name, with their modules: those whose weight other modules of the tree have too, and what
    that means. modules: the tree's by path."""
    wanted: dict[int, str] = {}
    for name, module in layers.items():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            wanted[id(weight)] = name
    sharing: dict[str, list[str]] = {}
    for path, module in modules.items():
        name = wanted.get(id(getattr(module, "weight", None)), "")
        if name and module is not layers[name]:
            sharing.setdefault(name, []).append(path)
    said = "its weight is tied to that of {}: merged the adapter changes them too, live it does not"
    return {name: said.format(", ".join(paths)) for name, paths in sharing.items()}


def _shape_problem(name: LayerName, expected: LayerShape, module: nn.Module) -> str | None:
    if name.vector:
        found = LayerShape(getattr(module, name.vector[1]).numel(), 1)
    else:
        found = layer_shape(module)  # type: ignore[assignment]
    assert found is not None
    if name.rows is not None:
        if name.rows[1] > found.out_features:
            return f"rows {name.rows[0]}:{name.rows[1]} of a layer with {found.out_features} output rows"
        found = replace(found, out_features=name.rows[1] - name.rows[0])
    if found != expected:
        return f"found a layer of shape {found}, expected {expected}"
    return None


def _near(path: str, modules: dict[str, nn.Module]) -> str:
    layers = [p for p, m in modules.items() if layer_shape(m) is not None]
    near = difflib.get_close_matches(path, layers, n=2, cutoff=0.6)
    return f" (near: {', '.join(near)})" if near else ""


def _refusal(report: AttachReport, part: str, root: nn.Module) -> str:
    problems = list(report.problems.items())
    shown = "; ".join(f"{name}: {why}" for name, why in problems[:3])
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    share = f"{len(problems)} of {len(problems) + len(report.matched)} layers of part {part!r} have no place"
    way_out = "strict=False applies the others" if report.matched else "is it for another model?"
    return f"{share} in this {type(root).__name__}: {shown}{more}. {way_out}"


def joined(reports: list[AttachReport]) -> AttachReport:
    """One report for several adapters."""
    matched = tuple(dict.fromkeys(name for r in reports for name in r.matched))
    unmatched = {name: why for r in reports for name, why in r.unmatched.items()}
    mismatched = {name: why for r in reports for name, why in r.mismatched.items()}
    shared = {name: why for r in reports for name, why in r.tied.items()}
    return AttachReport(matched, unmatched, mismatched, shared)
