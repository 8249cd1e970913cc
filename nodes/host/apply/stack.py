"""Live: adapters in the forward path of the host's model, on for the length of one call of it.

All live adapters of a patcher are one :class:`Stack`, a wrapper around ``apply_model``. At each call it gives
the modules their ``forward`` and takes it back in ``finally``, so that nothing, not even an interrupt, leaves
the base model changed. What that takes is worked out once per run (:mod:`.module_plan`) and only checked per
call: a hundred dictionary look-ups.

The weights are never touched: they may be offloaded, quantised or patched by others.

Shapes: those of :mod:`spectral_core.attach.update`; σ is (B,).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ....spectral_core.adapter.schedule import Schedule
from ....spectral_core.attach.kinds import update_of
from ....spectral_core.attach.update import Control
from ....spectral_core.gates.formula import GateRuntime
from ..model import compat, memory, noise
from ..model.places import Place
from . import folded_cache as factors
from . import gate_records as records
from . import module_plan as plans
from .module_plan import Plan

KEY = "spectral_adapters"


@dataclass(frozen=True, eq=False)
class Entry:
    """One adapter on one patcher: where it goes and how strongly. ``key`` is that of its records."""

    key: str
    places: tuple[Place, ...]
    strengths: tuple[float, ...]
    schedule: Schedule | None = None


class Stack:
    """All live adapters of one patcher, immutable: a clone with one more has another stack.

    It is the APPLY_MODEL wrapper itself. (It has no method ``to``: the host would call it.)
    """

    is_spectral_live = True

    def __init__(self, entries: tuple[Entry, ...], side: str) -> None:
        self.entries, self.side = entries, side
        self.controls = [Control(GateRuntime(), entry.schedule) for entry in entries]
        self._pieces = [[factors.kept_pieces(p.name, p.layer) for p in entry.places] for entry in entries]
        self._plans: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()
        self._follows_noise = any(
            entry.schedule is not None or any(not p.layer.mergeable for p in entry.places)
            for entry in entries
        )

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's ``apply_model(x, t, …)``, t being σ of every batch row."""
        model = executor.class_obj
        if self._follows_noise:
            self.set_progress(noise.progress_of(model.model_sampling, t))
        with self.on(model):
            return executor(x, t, *args, **kwargs)

    def set_progress(self, progress: float | Tensor) -> None:
        for control in self.controls:
            control.gates.progress = progress
            control.set_progress(progress)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """The adapters are on the model inside the block."""
        plan = self._plans.get(model)
        if plan is not None and plan.is_on:  # the model called from inside its own call
            yield
            return
        plan = self._plan(model)
        with compat.layers_called():
            try:
                compat.forget(model)
                plan.put_on()
                yield
                plan.check_called()
            finally:
                plan.take_off()
                compat.forget(model)

    def _plan(self, model: nn.Module) -> Plan:
        # kept between runs, and what can be kept of one that does not fit any more (another wrapper puts a
        # compiled module in the place of one): a compiled model compiles again for new objects
        plan = self._plans.get(model)
        if plan is None or not plan.fits():
            plan = self._plans[model] = self._make_plan(model, plan)
        return plan

    def _cast(self, device: torch.device, dtype: torch.dtype) -> None:
        """Have the factors ready: what is not, breaks the graph of a compiled model at its layer."""
        for pieces in self._pieces:
            for layer in pieces:
                for piece in layer:
                    if piece.linear:
                        piece.ready(device, dtype, 1.0)

    def check(self, model: nn.Module) -> None:
        """Raises SpectralAdapterError for a layer that only a weight patch can change."""
        self._make_plan(model)

    def begin(self, patcher: Any) -> None:
        """At the start of a sampling run: fresh records, factors on the device, and every complaint before
        the first step."""
        self.start_records()
        self._plan(patcher.model)
        self._cast(patcher.load_device, compat.compute_dtype(patcher))

    def start_records(self) -> None:
        for entry, control in zip(self.entries, self.controls, strict=True):
            if any(not place.layer.mergeable for place in entry.places):
                control.gates.recorder = records.start(entry.key, self.side)

    def release(self, patcher: Any = None) -> None:
        """At the end of a run: give back what was cast for its device."""
        for pieces in self._pieces:
            for layer in pieces:
                for piece in layer:
                    piece.release()

    def needed(self, dtype: torch.dtype) -> int:
        """Bytes of all factors in the model's precision, and of the gates. Folds what is not folded yet."""
        total = 0
        for entry, pieces in zip(self.entries, self._pieces, strict=True):
            for strength, kept in zip(entry.strengths, pieces, strict=True):
                total += sum(piece.nbytes(dtype, strength) for piece in kept)
        return total

    def _make_plan(self, model: nn.Module, old: Plan | None = None) -> Plan:
        plan = plans.find(model, [place for entry in self.entries for place in entry.places], old)
        if plan is old:
            return plan
        modules, updates = iter(plan.modules), []
        for entry, control, pieces in zip(self.entries, self.controls, self._pieces, strict=True):
            for place, strength, kept in zip(entry.places, entry.strengths, pieces, strict=True):
                name = plans.layer_name(place)
                module = next(modules)
                kind = update_of(name, module)
                update = kind(name, place.layer, strength, control, module, trained=False)
                update.pieces = kept
                update._digest = factors.digest(place.layer)
                updates.append(update)
        plans.hook(plan, updates)
        return plan


def stack_of(patcher: Any) -> Stack | None:
    """The live adapters that a patcher carries."""
    found = patcher.get_wrappers(compat.APPLY_MODEL, KEY)
    return found[0] if found else None


def add(patcher: Any, entry: Entry, side: str) -> None:
    """Add an adapter to a patcher (of a clone: it is changed), in the forward path.

    Raises SpectralAdapterError for a layer that only a weight patch can change.
    """
    before = stack_of(patcher)
    stack = Stack((*(before.entries if before else ()), entry), side)
    stack.check(patcher.model)  # complaints belong to this node, not to the sampler
    stack.needed(torch.float32)  # folds: in the node, once
    for kind in (compat.APPLY_MODEL, compat.PREPARE_SAMPLING):
        patcher.remove_wrappers_with_key(kind, KEY)
    for kind in (compat.ON_PRE_RUN, compat.ON_CLEANUP):
        patcher.remove_callbacks_with_key(kind, KEY)
    patcher.add_wrapper_with_key(compat.APPLY_MODEL, KEY, stack)
    patcher.add_wrapper_with_key(compat.PREPARE_SAMPLING, KEY, memory.Announcement(stack.needed))
    patcher.add_callback_with_key(compat.ON_PRE_RUN, KEY, stack.begin)
    patcher.add_callback_with_key(compat.ON_CLEANUP, KEY, stack.release)
