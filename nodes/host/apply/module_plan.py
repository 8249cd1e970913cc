"""Where in the host's model the live adapters of a patcher act, worked out once and then only checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from ....spectral_core.attach.dispatcher import Dispatcher
from ....spectral_core.attach.targets import bypassed_layers, update_problem
from ....spectral_core.attach.update import LayerUpdate
from ....spectral_core.attach.vectors import vector_problem
from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.names.layer_name import LayerName
from ..model import compat
from ..model.places import Place


@dataclass(eq=False)
class Plan:
    """A model's modules and what they are given; valid while the tree is the one it was made for.

    modules: one per place of every entry. edges: (children of a module, name, child) along every path.
    hooks: (the module's __dict__, its own ``forward`` there or None, ours).
    """

    modules: list[nn.Module] = field(default_factory=list)
    edges: list[tuple[Any, str, Any]] = field(default_factory=list)
    hooks: list[tuple[dict[str, Any], Any, Dispatcher]] = field(default_factory=list)
    is_on: bool = False
    watches: list[Watched] | None = None

    def fits(self) -> bool:
        return all(children.get(name) is child for children, name, child in self.edges) and self.is_clean()

    def is_clean(self) -> bool:
        return all(own_dict.get("forward") is own for own_dict, own, _ in self.hooks)

    def put_on(self) -> None:
        self.is_on = True
        for own_dict, _, dispatcher in self.hooks:
            own_dict["forward"] = dispatcher
        if self.watches is None and not any(name == "_orig_mod" for _, name, _ in self.edges):
            self.watches = [Watched(dispatcher) for _, _, dispatcher in self.hooks]

    def check_called(self) -> None:
        """After the model's first call: SpectralAdapterError where a layer's weight was used and the layer
        was not called, so that its update did nothing."""
        for watched, (_, _, dispatcher) in zip(self.watches or (), self.hooks, strict=False):
            if watched.is_bypassed:
                name = dispatcher.updates[0].name if dispatcher.updates else type(dispatcher.module).__name__
                raise SpectralAdapterError(
                    f"layer {name}: the model reads its weight and never calls the layer, so that a live "
                    "update does nothing there. Choose mode merged (an adaptive adapter frozen first, Fuse "
                    "Adapters with freeze_gates), or leave this layer out (Adapter Strength: its block at 0)"
                )

    def take_off(self) -> None:
        self.is_on = False
        for watched in self.watches or ():
            watched.off()
        if any(watched.is_bypassed for watched in self.watches or ()):
            self.watches = None  # looked at again in the next call
        for own_dict, own, dispatcher in self.hooks:
            if own_dict.get("forward") is not dispatcher:
                if own_dict.get("forward") is not own:
                    dispatcher.updates = ()  # someone put a patch over ours: it passes through from here on
            elif own is None:
                del own_dict["forward"]
            else:
                own_dict["forward"] = own


class Watched(dict[str, Any]):
    """The parameters of a module for one call of the model, which note whether the weight was read although
    the module was not called."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher, self.base = dispatcher, dispatcher.base
        self.module, self.own = dispatcher.module, dispatcher.module._parameters
        self.read = self.called = False
        super().__init__(self.own)
        self.module.__dict__["_parameters"] = self
        dispatcher.base = self._called

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return self.base(*args, **kwargs)

    def __getitem__(self, name: str) -> Any:
        self.read = self.read or name == "weight"
        return super().__getitem__(name)

    @property
    def is_bypassed(self) -> bool:
        return self.read and not self.called

    def off(self) -> None:
        if self.module.__dict__.get("_parameters") is self:
            self.own.update(self)  # the host may have put a weight somewhere else
            self.module.__dict__["_parameters"] = self.own
        if self.dispatcher.base == self._called:
            self.dispatcher.base = self.base


def find(model: nn.Module, places: Sequence[Place], old: Plan | None = None) -> Plan:
    """A plan with the modules of the places, still without hooks; the old one where the modules are its own
    and only the way to them is new.

    Raises SpectralAdapterError for a layer that only a weight patch can change.
    """
    plan, seen = Plan(), set[tuple[int, str]]()
    bypassed = bypassed_layers(model)
    for place in places:
        module = _walk(model, place.module_path, plan.edges, seen)
        why = _problem(place, module, bypassed)
        if why is not None:
            raise SpectralAdapterError(
                f"layer {place.name} cannot be applied live: {why}. Choose mode merged (an adaptive adapter "
                "frozen first, Fuse Adapters with freeze_gates), or leave this layer out (Adapter Strength: "
                "its block at 0)"
            )
        plan.modules.append(cast(nn.Module, module))
    if old is not None and old.is_clean() and list(map(id, old.modules)) == list(map(id, plan.modules)):
        old.edges = plan.edges
        return old
    return plan


def hook(plan: Plan, updates: Sequence[LayerUpdate]) -> None:
    """Prepare the ``forward`` of every module; one update per module of the plan."""
    by_module: dict[int, tuple[nn.Module, list[LayerUpdate]]] = {}
    for module, update in zip(plan.modules, updates, strict=True):
        by_module.setdefault(id(module), (module, []))[1].append(update)
    for module, on_it in by_module.values():
        own = module.__dict__.get("forward")
        dispatcher = Dispatcher(module)
        dispatcher.updates = tuple(sorted(on_it, key=lambda update: update.order))
        # the host's bypass LoRA leaves the class's own forward on the instance
        is_plain = own is None or getattr(own, "__func__", None) is type(module).forward
        dispatcher.in_place = is_plain and compat.makes_new_output(module)
        plan.hooks.append((module.__dict__, own, dispatcher))


def layer_name(place: Place) -> LayerName:
    """The layer's name with the rows of the host's weight that it is."""
    name = LayerName.parse(place.name)
    rows = None if place.offset is None else (place.offset[1], place.offset[1] + place.offset[2])
    return LayerName(name.part, name.path, rows)


def _problem(place: Place, module: Any | None, bypassed: dict[int, str]) -> str | None:
    """Why a layer cannot be applied in the forward path, or None."""
    if module is None:
        return f"{place.module_path} is not in this model any more"
    if place.function is not None:
        return f"the host rearranges what is added to {place.key}"
    if place.offset is not None and getattr(module, "groups", 1) != 1:
        return f"it is some rows of {place.key}, a grouped convolution"
    if place.offset is not None and place.offset[0] != 0:
        return f"it is some columns of {place.key}"
    vector = LayerName.parse(place.name).vector
    if vector is not None:
        return bypassed.get(id(module)) or vector_problem(module, vector[1], live=True)
    return bypassed.get(id(module)) or update_problem(module, place.layer)


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
