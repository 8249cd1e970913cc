"""Weights that the host streams to the device while a model trains: none of them is kept there for backward.

The host casts a weight that is not on the device, or of another type, for the one product that needs it. What
autograd keeps for backward would then be that copy, so that after a forward pass the whole model lay on the
device; and newer hosts write the next layer's weight over it. Here a pass that is to have a derivative gets
copies of its own, and in place of each autograd keeps how it is made again.

Shapes: those of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.ops
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Streams:
    """The copies that are alive, by their memory, and how each is made again."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[StorageWeakRef, Callable[[], Tensor]]] = {}

    def cast_bias_weight(
        self,
        own: Callable[..., Any],
        layer: Any,
        input: Any = None,
        dtype: Any = None,
        device: Any = None,
        bias_dtype: Any = None,
        **more: Any,
    ) -> Any:
        """The host's function of that name, ``own``, seen."""
        if not torch.is_grad_enabled():
            return own(layer, input, dtype, device, bias_dtype, **more)
        offloadable = more.pop("offloadable", False)
        if input is not None:
            dtype = dtype or getattr(getattr(input, "params", None), "orig_dtype", None) or input.dtype
            bias_dtype, device = bias_dtype or dtype, device or input.device

        def cast() -> Any:
            return own(layer, None, dtype, device, bias_dtype, **more)[:2]

        found = cast()
        for place, (made, kept) in enumerate(zip(found, (layer.weight, layer.bias), strict=True)):
            if isinstance(made, Tensor) and kept is not None and _memory(made) != _memory(kept):
                self._made[_memory(made)] = _storage(made), partial(_one_of, cast, place)
        return (*found, None) if offloadable else found

    def again(self, tensor: Tensor) -> Callable[[], Tensor] | None:
        """What makes a tensor again that is such a copy, or a view of one; None for every other."""
        known = self._made.get(_memory(tensor))
        if known is None:
            return None
        alive, make = known
        if alive.expired() or alive != _storage(tensor):
            del self._made[_memory(tensor)]
            return None
        dtype, shape, strides = tensor.dtype, tensor.shape, tensor.stride()
        offset, is_plain = tensor.storage_offset(), not _is_quantised(tensor)

        def made() -> Tensor:
            with torch.no_grad():
                fresh = make()
                fresh = fresh if fresh.dtype == dtype else fresh.to(dtype)
                return fresh.as_strided(shape, strides, offset) if is_plain else fresh

        return made


def _one_of(cast: Callable[[], Any], place: int) -> Tensor:
    return cast()[place]  # type: ignore[no-any-return]


def _is_quantised(tensor: Tensor) -> bool:
    return hasattr(tensor, "_qdata")


def _data(tensor: Any) -> torch.UntypedStorage:
    return (tensor._qdata if _is_quantised(tensor) else tensor).untyped_storage()  # type: ignore[no-any-return]


def _memory(tensor: Tensor) -> int:
    return _data(tensor).data_ptr()


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(_data(tensor))


@contextmanager
def streamed(root: torch.nn.Module) -> Iterator[Streams]:
    """Inside, what the host casts for a pass with a derivative can be made again; the host's own function
    afterwards. Layers of this tree that have one of their own (ComfyUI-GGUF's, which unpack) are seen too."""
    own, streams = comfy.ops.cast_bias_weight, Streams()
    unpacking = [m for m in root.modules() if callable(getattr(type(m), "cast_bias_weight", None))]
    try:
        comfy.ops.cast_bias_weight = partial(streams.cast_bias_weight, own)
        for layer in unpacking:
            theirs = getattr(type(layer), "cast_bias_weight")  # noqa: B009
            vars(layer)["cast_bias_weight"] = partial(streams.cast_bias_weight, theirs, layer)
        yield streams
    finally:
        comfy.ops.cast_bias_weight = own
        for layer in unpacking:
            vars(layer).pop("cast_bias_weight", None)


def load(patcher: Any, offload: str, needed: int) -> None:
    """Load a patcher as the setting ``offload`` says. needed: bytes of a pass.

    auto: as the host finds room beside what is needed. none: all of it on the device. half, all: that much of
    it is not.
    """
    comfy.model_management.load_models_gpu(
        [patcher], memory_required=needed, force_full_load=offload != "auto"
    )
    if share := _OFF_DEVICE.get(offload, 0.0):
        make_room(patcher, share)


_OFF_DEVICE = {"half": 0.5, "all": 1.0}


def make_room(patcher: Any, share: float) -> bool:
    """Take a share of what the patcher has on the device off it; whether anything went.

    What the host cannot stream stays.
    """
    before, casts = patcher.loaded_size(), patcher.force_cast_weights
    wanted = before if share >= 1 else int(share * before)
    try:
        patcher.force_cast_weights = False  # 0.3.64 sets it on layers that know nothing of it
        with torch.inference_mode(False):
            return bool(wanted and patcher.partially_unload(patcher.offload_device, wanted))
    finally:
        patcher.force_cast_weights = casts
