"""The instance-level ``forward`` of a module that carries adapters.

Nothing is registered on the module, so its state_dict does not change, and its weight is never touched, so
any weight works that the module itself can compute with.

Shapes: those of :mod:`.update`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..errors import SpectralAdapterError
from .update import LayerUpdate

# What these return is a fresh tensor that their backward does not need: an update may be added in place.
_FRESH_OUTPUT = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class Dispatcher:
    """The instance-level ``forward`` of a module with adapters: its own forward, then every update."""

    is_spectral_dispatcher = True  # told by this: a process may hold two copies of this package

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own: Callable[..., Tensor] | None = module.__dict__.get("forward")
        plain = type(module).forward
        self.base: Callable[..., Tensor] = MethodType(plain, module) if self.own is None else self.own
        self.in_place = self.own is None and plain in _FRESH_OUTPUT
        self.updates: tuple[LayerUpdate, ...] = ()

    @classmethod
    def on(cls, module: nn.Module) -> Dispatcher:
        """The module's dispatcher, or a new one, which its first update puts in place."""
        found = module.__dict__.get("forward")
        return found if getattr(found, "is_spectral_dispatcher", False) else cls(module)  # type: ignore[return-value]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(x, Tensor):
            raise SpectralAdapterError(
                f"layer {self.updates[0].name}: is given a {type(x).__name__}, and an update in the forward "
                "path needs a tensor: merge the adapter (in ComfyUI: mode merged), or leave this "
                "layer out of the targets"
            )
        y = self.base(*args, **kwargs)
        in_place = self.in_place
        for update in self.updates:
            added = update.add(x, y, in_place)
            in_place = in_place or added is not y
            y = added
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatcher:
        """A copied tree computes what the original computes now, from then on independent of it.

        Adapters in training are copied as they are, and the copy of them is fixed; fixed ones share their
        tensors.
        """
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module, memo)  # still empty here, if the copy began above it
        twin.own = copy.deepcopy(self.own, memo)
        twin.base = MethodType(type(self.module).forward, twin.module) if twin.own is None else twin.own
        twin.updates = tuple(update.fixed_copy(memo) for update in self.updates)
        return twin

    def insert(self, update: LayerUpdate) -> None:
        """Add an update, in its place among the others."""
        self.updates = (*self.updates, update)
        self.sort()
        if len(self.updates) == 1:
            self.module.__dict__["forward"] = self

    def sort(self) -> None:
        """Sums of floats depend on their order; this one depends on the updates alone."""
        if len(self.updates) > 1:
            self.updates = tuple(sorted(self.updates, key=lambda update: update.order))

    def take_off(self, update: LayerUpdate) -> None:
        """Remove an update; with the last one the module is as it was. Harmless when it is not there."""
        self.updates = tuple(u for u in self.updates if u is not update)
        # A patch that someone put over ours since then stays; ours passes through beneath it.
        if not self.updates and self.module.__dict__.get("forward") is self:
            if self.own is None:
                del self.module.__dict__["forward"]
            else:
                self.module.__dict__["forward"] = self.own
