"""Every difference between host versions, and every host function whose name we rely on, in one place.

Measured on 0.3.64 and 0.28.0; what both have is called elsewhere directly.

Shapes: up (out, R), down (R, in, *kernel).
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.utils
import comfy.weight_adapter
import torch
from torch import Tensor

from ....spectral_core.errors import SpectralAdapterError

APPLY_MODEL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
_ROPE = ("apply_rope", "rms_rope")  # rotary positions, alone and after a norm
PREPARE_SAMPLING = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
ON_PRE_RUN = comfy.patcher_extension.CallbacksMP.ON_PRE_RUN
ON_CLEANUP = comfy.patcher_extension.CallbacksMP.ON_CLEANUP


def weight_patch(up: Tensor, down: Tensor) -> Any:
    """The host's own low-rank weight patch: strength · up · down, scale 1."""
    return comfy.weight_adapter.LoRAAdapter(set(), (up, down, None, None, None, None))


def model_keys(patcher: Any) -> dict[str, Any]:
    """The host's map of a model, by name: a name in files -> its weight (key, or (key, offset[, function])).

    Sorted: the host builds it from sets, so its own order is another one in every process.
    """
    # a fresh dictionary: the default argument of these functions is one for the whole process
    return dict(sorted(comfy.lora.model_lora_keys_unet(patcher.model, {}).items()))


def clip_keys(clip: Any) -> dict[str, Any]:
    """The host's map of the text encoders."""
    return dict(comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))


def original_weight(patcher: Any, key: str, device: torch.device) -> Tensor:
    """The weight as the checkpoint has it, in float32, whatever is patched into the loaded model; a copy.

    Raises SpectralAdapterError for a weight without numbers (a model whose weights the host has let go).
    """
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    if key in patcher.backup:
        weight = patcher.backup[key].weight
    elif key in patcher.hook_backup:
        weight = patcher.hook_backup[key][0]
    if weight is None or weight.is_meta:
        raise SpectralAdapterError(f"weight {key} has no numbers in this model: load the model again")
    if is_packed(weight):
        return _unpacked(patcher, key, weight).to(device)
    whole = comfy.model_management.cast_to_device(weight, device, torch.float32, copy=True)
    return whole if convert is None else convert(whole, inplace=True)


def is_packed(weight: Any) -> bool:
    """ComfyUI-GGUF's tensors: bytes that its layers unpack, under the shape of the weight in them."""
    return isinstance(weight, Tensor) and hasattr(weight, "tensor_type")


def _unpacked(patcher: Any, key: str, weight: Any) -> Tensor:
    """The weight in float32, by the layer's own code, without the patches that are noted on it."""
    layer = comfy.utils.get_attr(patcher.model, key.rpartition(".")[0])
    unpack = getattr(layer, "get_weight", None)
    if unpack is None:
        raise SpectralAdapterError(
            f"weight {key} is a GGUF tensor, and its layer cannot unpack it: update ComfyUI-GGUF"
        )
    noted, weight.patches = weight.patches, []
    try:
        found: Tensor = unpack(weight, torch.float32)
    finally:
        weight.patches = noted
    return found.clone()


def packed_copy(weight: Any) -> Any:
    """The same packed tensor made anew, of the mode (inference or not) that holds here: its own ``clone``
    gives itself."""
    plain = weight.as_subclass(Tensor).clone()
    return type(weight)(
        plain, tensor_type=weight.tensor_type, tensor_shape=weight.tensor_shape, patches=list(weight.patches)
    )


def patch_problem(patcher: Any, key: str) -> str | None:
    """Why the host could not add a patch to a weight, or None; its own quantised weights it can convert."""
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    # a patcher of another pack brings its own way (GGUF's dequantises)
    if convert is not None or not type(patcher).__module__.startswith("comfy."):
        return None
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        return f"the weight {key} is quantised ({weight.dtype})"
    return None


def is_rounded(patcher: Any, key: str) -> bool:
    """Whether a patch to a weight is rounded to a few bits when the host adds it: its weights are quantised,
    and its patcher is not one that leaves them as they are (GGUF's)."""
    if not type(patcher).__module__.startswith("comfy."):
        return False
    return is_quantised(comfy.model_patcher.get_key_weight(patcher.model, key)[0])


def is_quantised(weight: Any) -> bool:
    """The host's own quantised tensors, and plain ones of 8 bits."""
    return isinstance(weight, Tensor) and (hasattr(weight, "_layout_cls") or weight.element_size() == 1)


def copied(quantised: Any) -> Any:
    """The same quantised tensor made anew, of the mode (inference or not) that holds here."""
    parts = {f.name: getattr(quantised._params, f.name) for f in dataclasses.fields(quantised._params)}
    parts = {name: part.clone() if isinstance(part, Tensor) else part for name, part in parts.items()}
    params = type(quantised._params)(**parts)
    return type(quantised)(quantised._qdata.clone(), quantised._layout_cls, params)


def as_inference(weight: Any) -> Any:
    """The same weight as an inference tensor, on the same memory; quantised ones are made anew, and another
    pack's kind is left as it is. To be called in inference mode."""
    if hasattr(weight, "_layout_cls"):
        return copied(weight)
    if type(weight) not in (Tensor, torch.nn.Parameter):
        return weight
    fresh = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return fresh.set_(weight.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride())


def rounding_error(patcher: Any, key: str, add: Callable[[Tensor], Tensor], seed: int = 0) -> float:
    """‖W′ − (W + ΔW)‖ / ‖ΔW‖ for the W′ that the host makes of W + ΔW; add: W to W + ΔW, float32."""
    weight, set_weight, _ = comfy.model_patcher.get_key_weight(patcher.model, key)
    before = original_weight(patcher, key, torch.device("cpu"))
    wanted = add(before.clone())
    if set_weight is not None:
        found = set_weight(wanted.clone(), inplace_update=False, seed=seed, return_weight=True)
    else:
        found = comfy.float.stochastic_rounding(wanted, weight.dtype, seed=seed)
    found = found.dequantize() if hasattr(found, "dequantize") and hasattr(found, "_layout_cls") else found
    change = (wanted - before).norm()
    return float((found.float() - wanted).norm() / change) if change > 0 else 0.0


@contextmanager
def layers_called() -> Iterator[None]:
    """Inside, the host calls a layer that carries an update, where it would only read its weight.

    Newer hosts fold an activation into an int8 product (``linear_input_act``), past the layer's forward.
    """
    ops = comfy.ops
    own = getattr(ops, "linear_input_act", None)
    if own is None:
        yield
        return

    def linear_input_act(linear: Any, x: Tensor, input_act: str) -> Any:
        if "forward" in vars(linear):
            return linear(ops.INPUT_ACT_EAGER[input_act](x))
        return own(linear, x, input_act)

    ops.linear_input_act = linear_input_act
    try:
        yield
    finally:
        ops.linear_input_act = own


def keeps_passes(model: Any) -> bool:
    """Whether a model keeps keys and values of a prompt from one pass to the next, as HiDream-O1 does."""
    return hasattr(getattr(model, "diffusion_model", None), "clear_kv_cache")


def forget(model: Any) -> None:
    """Have a model forget what it keeps of earlier passes: it is of the weights of then, and the host goes on
    with it under others."""
    if keeps_passes(model):
        model.diffusion_model.clear_kv_cache()


def anew(model: Any) -> dict[str, bool]:
    """Arguments with which a model computes in each block what the blocks else hand on among themselves
    (SeedVR2): a block that runs again for backward would find it there, and compute something else."""
    forward = type(model.diffusion_model).forward
    return {"disable_cache": True} if "disable_cache" in inspect.signature(forward).parameters else {}


def free_memory(needed: int, device: torch.device) -> None:
    """Ask the host to make room; the CPU has no model to push out."""
    if not comfy.model_management.is_device_cpu(device):
        comfy.model_management.free_memory(needed, device)


def compute_dtype(patcher: Any) -> torch.dtype:
    """What a model computes in: the type its weights are cast to where that is set, else their own."""
    dtype = getattr(patcher.model, "manual_cast_dtype", None) or patcher.model_dtype()
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def makes_new_output(module: torch.nn.Module) -> bool:
    """Whether a layer's result is a new tensor that an update may be written into: the host's own do."""
    return type(module).__module__ == "comfy.ops"


def with_own_weights(model: Any) -> Any:
    """The patcher to train on: itself, or where the host streams the weights in, one that keeps them."""
    if not getattr(model, "is_dynamic", bool)():
        return model
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise SpectralAdapterError(
            "this model's weights are streamed in while it runs and it cannot be loaded anew: start ComfyUI "
            "with --disable-dynamic-vram, or load the model from a file"
        ) from error


@contextmanager
def in_training() -> Iterator[None]:
    """The host's models in the form that has derivatives: its own sign for that (newer hosts), instead of
    its fused kernels, which have none, the reference functions that they are tested against, and sums of its
    language models that are new tensors."""
    host = comfy.model_management
    before = getattr(host, "in_training", None)
    replaced = _reference_kernels()
    kernels: Any = sys.modules.get("comfy_kitchen")
    own = {name: getattr(kernels, name) for name in replaced}
    language: Any = sys.modules.get("comfy.text_encoders.llama")
    try:
        if before is not None:
            host.in_training = True
        for name, function in replaced.items():
            setattr(kernels, name, function)
        if language is not None:
            language.torch = _TorchThatAddsAnew()
        yield
    finally:
        if before is not None:
            host.in_training = before
        for name, function in own.items():
            setattr(kernels, name, function)
        if language is not None:
            language.torch = torch


class _TorchThatAddsAnew:
    """torch, whose ``add`` leaves ``out`` alone: a sum written into a given tensor has no derivative. The
    host's blocks go on with what is returned."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def add(one: Tensor, two: Tensor, *, out: Tensor | None = None) -> Tensor:
        return torch.add(one, two)


def _reference_kernels() -> dict[str, Any]:
    """Kernel -> the same in plain torch operations, of the library that brings both."""
    rope: Any = sys.modules.get("comfy_kitchen.backends.eager.rope")
    names = [f"{kind}{half}{one}" for kind in _ROPE for half in ("", "_split_half") for one in ("", "1")]
    return {name: found for name in names if (found := getattr(rope, name, None)) is not None}
