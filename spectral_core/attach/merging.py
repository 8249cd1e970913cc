"""Write adapters into the weights of a module tree, and take them out again exactly.

A merged weight is always computed anew: the kept original in float32 (float64 if it is that), plus the ΔW
of every merge that is in force, cast once to the weight's own dtype. So merges commute, any of them can be
taken out first, and with the last one the original's bits come back. Weights change in place: a parameter
keeps its identity.

Shapes: weights (out, in, *kernel); ΔW of a layer with rows goes to those output rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ..adapter.adapter import Adapter, AdapterLayer
from ..errors import SpectralAdapterError
from ..maths.layers import as_fp32
from ..maths.lowrank import check_usable, delta
from ..names.layer_name import LayerName
from .placement import AttachReport, Placement, joined, place
from .targets import weight_problem

_RECORD = "_spectral_merges"  # on the parameter itself, so that a merge finds what earlier ones kept


@dataclass(eq=False)
class _Change:
    """One layer's ΔW in one merge."""

    name: LayerName
    layer: AdapterLayer
    strength: float

    @property
    def order(self) -> tuple[str, float]:
        return self.layer.content_hash, self.strength

    def add_to(self, weight: Tensor) -> None:
        factors = check_usable(self.layer.factors(self.strength), f"layer {self.name}")
        on_device = type(factors)(factors.down.to(weight), factors.up.to(weight), factors.scale)
        rows = self.name.rows
        target = weight if rows is None else weight[rows[0] : rows[1]]
        target.add_(delta(on_device).reshape(target.shape))


@dataclass(eq=False)
class _Record:
    """What is merged into one parameter, and the original from before."""

    original: Tensor
    changes: list[_Change] = field(default_factory=list)
    version: int | None = None  # of the parameter after our last write; None while that is uncertain

    def check(self, weight: Tensor, name: LayerName) -> None:
        if self.version is not None and self.version != weight._version:
            raise SpectralAdapterError(
                f"layer {name}: its weight was changed by something else since the merge, and "
                "that change would be lost; undo it first, or unmerge(discard_changes=True)"
            )

    def write(self, weight: Tensor, changes: list[_Change]) -> None:
        """weight = original + Σ ΔW, in place."""
        self.version = None
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            if changes:
                total = as_fp32(self.original.to(weight.device)).clone()
                for change in sorted(changes, key=lambda c: c.order) if len(changes) > 1 else changes:
                    change.add_to(total)
                weight.copy_(total)
                _check_finite(changes[-1].name, weight, self.original)
            else:
                weight.copy_(self.original)
        self.version = None if weight.is_inference() else weight._version


def _check_finite(name: LayerName, weight: Tensor, original: Tensor) -> None:
    """Refuse a weight that holds NaN or infinity, and say whether it did before."""
    if bool(torch.isfinite(weight).all()):
        return
    if not bool(torch.isfinite(original).all()):
        raise SpectralAdapterError(
            f"layer {name}: the model's own weight holds NaN or infinite values, before anything is merged: "
            "load the model again, or another one"
        )
    raise SpectralAdapterError(
        f"layer {name}: merged, its weight leaves the range of {weight.dtype} (largest "
        f"{torch.finfo(weight.dtype).max:g}): lower the strength, or load the model in a wider dtype"
    )


class Merged:
    """Adapters in the weights of a tree. A context manager; or call :meth:`unmerge`, in any order among
    several."""

    def __init__(self, report: AttachReport) -> None:
        self.report = report
        self._changes: list[tuple[nn.Parameter, _Change]] = []

    def __enter__(self) -> Merged:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unmerge()

    def unmerge(self, discard_changes: bool = False) -> None:
        """Take this merge out of the weights; a second time does nothing, and after an interruption it
        continues.

        discard_changes: also where something else changed a weight since, which is otherwise refused.
        """
        if not discard_changes:
            for weight, change in self._changes:
                _record(weight).check(weight, change.name)
        while self._changes:
            weight, change = self._changes[-1]
            record = _record(weight)
            remaining = [c for c in record.changes if c is not change]
            record.write(weight, remaining)
            record.changes = remaining
            if not remaining:
                weight.__dict__.pop(_RECORD, None)
            self._changes.pop()


def _record(weight: nn.Parameter, keep_on: str | None = None) -> _Record:
    """The parameter's record; a new one with a copy of the weight where there is none."""
    record = weight.__dict__.get(_RECORD)
    if record is None:
        original = weight.detach().clone()
        record = _Record(original if keep_on is None else original.to(keep_on))
        weight.__dict__[_RECORD] = record
    return cast(_Record, record)


def merge_into(
    root: nn.Module,
    adapters: Adapter | Iterable[Adapter],
    part: str | None = None,
    strict: bool = True,
    keep_on: str | None = None,
) -> Merged:
    """Add adapters to the weights of a module tree: W + Σ strength · ΔW, rounded once.

    part: whose layers, ``<part>.*``; without it each adapter's only part. strict: every layer must have
    its module and shape, otherwise ``.report`` names those that have not. keep_on: the device for the kept
    originals, such as ``"cpu"``; the weights' own by default.

    Raises SpectralAdapterError, with the weights as they were, for adapters without a fixed ΔW (adaptive
    gates, schedules), for quantised and meta weights, and where a layer or part does not fit.

    >>> import torch, spectral_core as sc
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> weights, report = sc.find_targets(model, "unet", "all")
    >>> adapter = sc.create(weights, sc.LoRAConfig(rank=2))
    >>> before = model[0].weight.clone()
    >>> merged = sc.merge_into(model, adapter)
    >>> merged.unmerge()
    >>> torch.equal(before, model[0].weight)
    True
    """
    single = getattr(adapters, "is_spectral_adapter", False)
    wanted = [cast(Adapter, adapters)] if single else list(cast("Iterable[Adapter]", adapters))
    if not wanted:
        raise SpectralAdapterError("found no adapter to merge")
    plans = [(adapter, *place(root, adapter, part, strict, live=False)) for adapter in wanted]
    for adapter, placements, _ in plans:
        _check(adapter, placements)
    merged = Merged(joined([report for _, _, report in plans]))
    try:
        for adapter, placements, _ in plans:
            for p in placements:
                weight = cast(nn.Parameter, p.parameter)
                change = _Change(p.name, p.layer, adapter.strength_of(str(p.name)))
                merged._changes.append((weight, change))
                record = _record(weight, keep_on)
                record.changes.append(change)
        for weight in {id(w): w for w, _ in merged._changes}.values():
            record = _record(weight)
            record.write(weight, record.changes)
    except BaseException:  # an interrupt too must not leave half of it behind
        merged.unmerge(discard_changes=True)
        raise
    return merged


def _check(adapter: Adapter, placements: list[Placement]) -> None:
    """Refuse what plain weights cannot hold, before anything is changed."""
    if adapter.schedule is not None:
        raise SpectralAdapterError(
            "weights cannot follow a strength schedule: attach the adapter, or merge "
            "adapter.with_schedule(None)"
        )
    owners: dict[tuple[int, tuple[int, int] | None], LayerName] = {}
    for p in placements:
        if not p.layer.mergeable:
            raise SpectralAdapterError(
                f"layer {p.name} has an adaptive gate, which has no fixed ΔW: freeze the adapter first "
                "(fusion.freeze), or attach it"
            )
        weight = p.parameter
        if not isinstance(weight, nn.Parameter) or weight.is_meta:
            found = (
                "a weight on the meta device" if isinstance(weight, nn.Parameter) else type(weight).__name__
            )
            raise SpectralAdapterError(
                f"layer {p.name}: found {found}, expected a parameter with numbers; attach instead"
            )
        if p.name.vector is None and (problem := weight_problem(p.module)):
            raise SpectralAdapterError(
                f"layer {p.name}: {problem}: it cannot hold a merge; attach the adapter instead"
            )
        if other := owners.get((id(weight), p.name.rows)):
            raise SpectralAdapterError(
                f"layers {other} and {p.name} share one weight, which would be changed twice: merge "
                "only one of them (adapter.only), or attach"
            )
        owners[id(weight), p.name.rows] = p.name
        if _RECORD in weight.__dict__:
            _record(weight).check(weight, p.name)
