"""Live: adapters in the forward path of the host's model, on for the length of one call of it.

All live adapters of a patcher are one :class:`Stack`, a wrapper around ``apply_model``. At each call it gives
the modules their ``forward`` and takes it back in ``finally``, so that nothing, not even an interrupt, leaves
the base model changed. What that takes is worked out once per run (:class:`_Plan`) and only checked per call:
a hundred dictionary look-ups.

The weights are never touched: they may be offloaded, quantised or patched by others.

Shapes: those of :mod:`spectral_core.live`; σ is (B,).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...spectral_core.adapter import AdapterLayer, LayerName
from ...spectral_core.errors import SpectralAdapterError
from ...spectral_core.folded import Piece, Ready, pieces_of
from ...spectral_core.gate import GateRuntime
from ...spectral_core.live import Control, Dispatcher, LayerUpdate
from ...spectral_core.schedule import Schedule
from ...spectral_core.targets import bypassed_layers, layer_problem
from . import compat, factors, memory, noise, records
from .keys import Place

KEY = "spectral_adapters"


@dataclass(frozen=True, eq=False)
class Entry:
    """One adapter on one patcher: where it goes and how strongly. ``key`` is that of its records."""

    key: str
    places: tuple[Place, ...]
    strengths: tuple[float, ...]
    schedule: Schedule | None = None


@dataclass(eq=False)
class _Kept(Piece):
    """A piece that is cast from the process-wide float32 factors instead of folded."""

    layer: AdapterLayer | None = None
    indices: tuple[int, ...] = ()

    def _fold(self, device: torch.device, dtype: torch.dtype, strength: float) -> Ready:
        up, down = self._masters(strength)
        return down.to(device, dtype), up.to(device, dtype), {k: v.to(device) for k, v in self._gate.items()}

    def _masters(self, strength: float) -> tuple[Tensor, Tensor]:
        assert self.layer is not None
        return factors.folded(self.layer, self.indices, 1.0 if self.linear else strength)

    @property
    def _gate(self) -> dict[str, Tensor]:
        params = self.terms[0].params
        return {k: v for k, v in params.items() if k.startswith("gate.")} if self.gated else {}

    def nbytes(self, dtype: torch.dtype, strength: float) -> int:
        """What it takes on the computing device."""
        numbers = sum(factor.numel() for factor in self._masters(strength))
        return numbers * dtype.itemsize + 4 * sum(value.numel() for value in self._gate.values())


def kept_pieces(name: str, layer: AdapterLayer) -> tuple[_Kept, ...]:
    """The core's pieces of a layer, each with its place in the kept factors."""
    found = []
    for piece in pieces_of(name, layer, trained=False):
        indices = tuple(i for i, term in enumerate(layer.terms) if any(term is t for t in piece.terms))
        found.append(_Kept(piece.shape, piece.terms, piece.gate_name, layer=layer, indices=indices))
    return tuple(found)


def problem(place: Place, module: Any | None, bypassed: dict[int, str]) -> str | None:
    """Why a layer cannot be applied in the forward path, or None."""
    if module is None:
        return f"{place.module_path} is not in this model any more"
    if place.function is not None:
        return f"the host rearranges what is added to {place.key}"
    if place.offset is not None and place.offset[0] != 0:
        return f"it is some columns of {place.key}"
    return bypassed.get(id(module)) or layer_problem(module)


@dataclass(eq=False)
class _Plan:
    """A model's modules and what they are given; valid while the tree is the one it was made for.

    edges: (children of a module, name, child) along every path. hooks: (the module's __dict__, its own
    ``forward`` there or None, ours).
    """

    edges: list[tuple[Any, str, Any]] = field(default_factory=list)
    hooks: list[tuple[dict[str, Any], Any, Dispatcher]] = field(default_factory=list)

    def fits(self) -> bool:
        return all(children.get(name) is child for children, name, child in self.edges) and all(
            own_dict.get("forward") is own for own_dict, own, _ in self.hooks
        )

    def dispatcher_of(self, module: nn.Module) -> Dispatcher | None:
        """What a module has here, if its own ``forward`` is still the one that it was made for."""
        own = module.__dict__.get("forward")
        for own_dict, old, dispatcher in self.hooks:
            if own_dict is module.__dict__ and own is old and dispatcher.updates:
                return dispatcher
        return None

    def put_on(self) -> None:
        for own_dict, _, dispatcher in self.hooks:
            own_dict["forward"] = dispatcher

    def take_off(self) -> None:
        for own_dict, own, dispatcher in self.hooks:
            if own_dict.get("forward") is not dispatcher:
                if own_dict.get("forward") is not own:
                    dispatcher.updates = ()  # someone put a patch over ours: it passes through from here on
            elif own is None:
                del own_dict["forward"]
            else:
                own_dict["forward"] = own


class Stack:
    """All live adapters of one patcher, immutable: a clone with one more has another stack.

    It is the APPLY_MODEL wrapper itself. (It has no method ``to``: the host would call it.)
    """

    is_spectral_live = True

    def __init__(self, entries: tuple[Entry, ...], side: str) -> None:
        self.entries, self.side = entries, side
        self.controls = [Control(GateRuntime(), entry.schedule) for entry in entries]
        self._pieces = [[kept_pieces(p.name, p.layer) for p in entry.places] for entry in entries]
        self._plans: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()
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
        plan = self._plan(model)
        try:
            plan.put_on()
            yield
        finally:
            plan.take_off()

    def _plan(self, model: nn.Module) -> _Plan:
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
                    piece._cache.clear()

    def needed(self, dtype: torch.dtype) -> int:
        """Bytes of all factors in the model's precision, and of the gates. Folds what is not folded yet."""
        total = 0
        for entry, pieces in zip(self.entries, self._pieces, strict=True):
            for strength, kept in zip(entry.strengths, pieces, strict=True):
                total += sum(piece.nbytes(dtype, strength) for piece in kept)
        return total

    def _make_plan(self, model: nn.Module, old: _Plan | None = None) -> _Plan:
        plan = _Plan()
        by_module: dict[int, tuple[nn.Module, list[LayerUpdate]]] = {}
        seen: set[tuple[int, str]] = set()
        bypassed = bypassed_layers(model)
        for entry, control, pieces in zip(self.entries, self.controls, self._pieces, strict=True):
            for place, strength, kept in zip(entry.places, entry.strengths, pieces, strict=True):
                module = _walk(model, place.module_path, plan.edges, seen)
                why = problem(place, module, bypassed)
                if why is not None:
                    raise SpectralAdapterError(_refusal(place, why))
                assert module is not None
                update = LayerUpdate(_name(place), place.layer, strength, control, module, trained=False)
                update.pieces = kept
                update._digest = factors.digest(place.layer)
                by_module.setdefault(id(module), (module, []))[1].append(update)
        for module, updates in by_module.values():
            own = module.__dict__.get("forward")
            dispatcher = old.dispatcher_of(module) if old is not None else None
            if dispatcher is None:
                dispatcher = Dispatcher(module)
                dispatcher.updates = tuple(sorted(updates, key=lambda update: update.order))
                dispatcher.in_place = own is None and compat.makes_new_output(module)
            plan.hooks.append((module.__dict__, own, dispatcher))
        return plan


def _refusal(place: Place, why: str) -> str:
    return (
        f"layer {place.name} cannot be applied live: {why}. Choose mode merged (an adaptive adapter frozen "
        "first, Fuse Adapters with freeze_gates), or leave this layer out (Adapter Strength: its block at 0)"
    )


def _name(place: Place) -> LayerName:
    """The layer's name with the rows of the host's weight that it is."""
    name = LayerName.parse(place.name)
    rows = None if place.offset is None else (place.offset[1], place.offset[1] + place.offset[2])
    return LayerName(name.part, name.path, rows)


def _walk(
    root: nn.Module, path: str, edges: list[tuple[Any, str, Any]], seen: set[tuple[int, str]]
) -> nn.Module | None:
    """The module at a path, through ``torch.compile``'s wrapper; every step of the way is noted once."""
    module: Any = root
    for step in path.split("."):
        for name in (step, "_orig_mod"):
            child = module._modules.get(name)
            if child is None:
                if name == step:
                    return None
                continue
            if (id(module), name) not in seen:
                seen.add((id(module), name))
                edges.append((module._modules, name, child))
            module = child
    return module  # type: ignore[no-any-return]


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
