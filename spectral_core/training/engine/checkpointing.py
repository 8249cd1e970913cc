"""What backward needs of a forward pass: kept, or computed again (gradient checkpointing), and right where a
model writes in place.

``full`` checkpoints every block, ``selective`` the transformer blocks only, or every second block of a model
that has no others. A block is told by structure: a module listed among others, with at least two layers of
its own and no list of such modules inside. With frozen weights a backward pass costs about as much as a
forward pass. Measured on SD 1.5's UNet (16×16 latents, batch 1, float32, two CPU cores, FouRA of rank 8 on
the attention layers):

    none       1.00 of the bytes kept for backward, 1.00 of the time
    selective  0.31, 1.27
    full       0.16, 1.52

Residual blocks keep little and their convolutions are dear, transformer blocks keep much: their wide
feed-forward layers. Results do not change: the same operations run on the same numbers.

Many models add to an activation in place after a layer has kept it for backward (``img += attention``). torch
refuses that, and its own checkpointing computes with the changed numbers and says nothing. Here a pass
knows by the tensors' version counters which of them change, and keeps copies of those.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ...attach.targets import layer_shape
from ...errors import SpectralAdapterError
from ...maths.precision import autocast_dtype, full_precision

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

Around = Callable[[], AbstractContextManager[Any]]
Recast = Callable[[Tensor], "Callable[[], Tensor] | None"]
"""What makes a tensor again that is a weight which was streamed in for one product; None for every other."""


def blocks(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a tree, in its order."""
    candidates: dict[str, nn.Module] = {}
    for path, module in root.named_modules():
        if isinstance(module, _LISTS):
            prefix = f"{path}." if path else ""
            candidates |= {f"{prefix}{n}": m for n, m in module.named_children() if _is_block(m)}
    listed = {id(m) for m in candidates.values()}
    inmost = {p: m for p, m in candidates.items() if not _lists_some(m, listed)}
    return [(p, m) for p, m in inmost.items() if not any(p.startswith(f"{outer}.") for outer in inmost)]


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, _LISTS) and sum(layer_shape(m) is not None for m in module.modules()) > 1


def _lists_some(module: nn.Module, listed: set[int]) -> bool:
    lists = (m for m in module.modules() if isinstance(m, nn.ModuleList))
    return any(id(child) in listed for m in lists for child in m.children())


def _is_residual(module: nn.Module) -> bool:
    shapes = (layer_shape(m) for m in module.modules())
    return any(shape is not None and shape.kernel for shape in shapes)


def modules_for(root: nn.Module, mode: str) -> list[tuple[str, nn.Module]]:
    """The modules that a mode checkpoints; SpectralAdapterError where the tree has none."""
    if mode == "none":
        return []
    found = blocks(root)
    if not found:
        raise SpectralAdapterError(
            f"checkpointing {mode!r}: {type(root).__name__} has no repeated blocks; use 'none'"
        )
    if mode == "full":
        return found
    chosen = [(name, module) for name, module in found if not _is_residual(module)]
    return chosen if 0 < len(chosen) < len(found) else found[::2]


@contextmanager
def checkpointed(
    roots: Iterable[nn.Module], mode: str, again: Around = nullcontext, recast: Recast | None = None
) -> Iterator[int]:
    """Checkpoint the modules of these trees inside the block; gives how many. Afterwards they are as before.

    again: makes a context for each pass that runs once more. recast: of weights that it knows nothing is
    kept, they are streamed in again. Gradients are right in every mode, ``none`` included, wherever the model
    writes in place.
    """
    with ExitStack() as undo:
        count = 0
        for root in roots:
            found = modules_for(root, mode)
            for _, module in found:
                undo.callback(_wrap(module, again, None, keeps=False))
            if not isinstance(root, _LISTS) and not any(module is root for _, module in found):
                undo.callback(_wrap(root, again, recast, keeps=True))
            count += len(found)
        yield count


def _wrap(module: nn.Module, again: Around, recast: Recast | None, keeps: bool) -> Callable[[], None]:
    own = vars(module).get("forward")
    forward = module.forward
    history = _History()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or (keeps and history.is_clean()):
            with nullcontext() if recast is None else _streaming(recast):
                return forward(*args, **kwargs)
        made = _Pass(forward, args, kwargs, again, module.training, history if keeps else None, recast)
        return made.run(args, kwargs)

    module.forward = wrapped

    def restore() -> None:
        if own is not None:
            module.forward = own
        else:
            vars(module).pop("forward", None)

    return restore


def _streaming(recast: Recast) -> AbstractContextManager[Any]:
    """Everything is kept for backward but the weights that can be streamed in again."""
    return saved_tensors_hooks(
        lambda tensor: recast(tensor) or tensor,
        lambda packed: packed if isinstance(packed, Tensor) else packed(),
    )


class _History:
    """What the earlier passes of a module have shown: which of the tensors kept for backward change later."""

    def __init__(self) -> None:
        self.changed: set[int] = set()
        self.backward_seen = False

    def is_clean(self) -> bool:
        return self.backward_seen and not self.changed


class _Pass:
    """One forward pass of a module, from which backward can have every tensor again.

    history None: nothing is kept and backward runs the module again. Else the tensors are kept, copies of
    those that were seen to change; only where one changes unexpectedly is the module run again.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        again: Around,
        draws: bool,
        history: _History | None,
        recast: Recast | None,
    ) -> None:
        self.forward, self.again, self.history = forward, again, history
        self.recast: Recast = recast or (lambda _: None)
        self.given = [_snapshot(a) for a in args], {k: _snapshot(a) for k, a in kwargs.items()}
        tensors = _tensors(self.given)
        self.versions = [t._version for t in tensors]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.autocast = _autocast(self.device.type)
        self.random = _random_state(self.device) if draws else None
        self.count = 0
        self.seen: list[tuple[Tensor, int]] = []
        self.kept: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.changed: set[int] = set() if history is None else history.changed
        self.values: dict[int, Tensor] = {}

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's result, on copies of what it was given: it may write into them."""
        with saved_tensors_hooks(self._pack, self._unpack):
            result = self.forward(*_copies(args), **_copies(kwargs))
        if self.history is None:
            self.changed = {i for i, (t, version) in enumerate(self.seen) if t._version != version}
        self.seen.clear()
        return result

    def _pack(self, tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter):
            return tensor
        if (streamed := self.recast(tensor)) is not None:
            return streamed
        index, self.count = self.count, self.count + 1
        kept = tensor.detach()
        if self.history is None:
            self.seen.append((kept, kept._version))
            return index
        if index in self.changed:
            kept = kept.clone()
        self.kept[index] = weakref.ref(kept), kept._version
        return index, kept, kept._version

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if callable(packed):
            return packed()  # type: ignore[no-any-return]
        if self.history is not None:
            self.history.backward_seen = True
            packed, kept, version = packed
            if kept._version == version:
                return kept  # type: ignore[no-any-return]
        if packed not in self.values:
            self._compute()
        return self.values.pop(packed)

    def _compute(self) -> None:
        """Run the module again, for the values of its tensors at the time they were wanted."""
        if self.versions != [t._version for t in _tensors(self.given)]:
            raise SpectralAdapterError(
                "gradient checkpointing: the model changed in place what it had given to a block; set "
                "gradient_checkpointing to none"
            )
        for index, (reference, version) in self.kept.items():
            kept = reference()
            if kept is not None and kept._version != version:
                self.changed.add(index)
        count = 0

        def keep(tensor: Tensor) -> int:
            nonlocal count
            if isinstance(tensor, nn.Parameter) or self.recast(tensor) is not None:
                return 0
            if count in self.changed:
                self.values[count] = tensor.detach().clone()
            elif self.history is None:
                self.values[count] = tensor.detach()
            count += 1
            return 0  # nothing of this graph is ever asked for

        with ExitStack() as around:
            around.enter_context(self.again())
            around.enter_context(torch.enable_grad())
            around.enter_context(self.autocast())
            if self.random is not None:
                around.enter_context(_random_of(self.random, self.device))
            around.enter_context(saved_tensors_hooks(keep, lambda _: torch.empty(0)))
            self.forward(*_copies(self.given[0]), **_copies(self.given[1]))
        if count != self.count:
            raise SpectralAdapterError(
                f"gradient checkpointing: a block kept {self.count} tensors, and {count} when it ran again: "
                "it does not compute the same twice; set gradient_checkpointing to none"
            )


def _snapshot(value: Any) -> Any:
    """What a pass was given, as it was then; tensors themselves."""
    if type(value) is dict:
        return dict(value)
    return type(value)(value) if type(value) in (list, tuple) else value


def _copies(values: Any) -> Any:
    """The same with copies of the tensors, for a module that may write into them."""
    if isinstance(values, nn.Parameter):
        return values
    if isinstance(values, Tensor):
        return values.clone()
    if type(values) is dict:
        return {key: item if type(item) is dict else _copies(item) for key, item in values.items()}
    if type(values) in (list, tuple):
        return type(values)(item if type(item) is dict else _copies(item) for item in values)
    return values


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if type(values) is dict:
        return [t for item in values.values() if type(item) is not dict for t in _tensors(item)]
    if type(values) in (list, tuple):
        return [t for item in values for t in _tensors(item)]
    return []


def _autocast(kind: str) -> Around:
    """Makes the autocast that holds now, again."""
    dtype = autocast_dtype(kind)
    if dtype is None:
        return lambda: full_precision(torch.device(kind))
    caches = torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(kind, dtype, cache_enabled=caches)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _random_of(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
