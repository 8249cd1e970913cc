"""Shared by the ``inside_lora_*`` scripts: what the host's Load LoRA does with a file, and what ours does."""

from pathlib import Path

import comfy.lora
import comfy.sd
import comfy.utils
import torch
from inside_apply_lib import FOLDER, pack

loras, paths, applying = (pack(f"nodes.host.{n}") for n in ("files.loras", "files.paths", "apply.adapters"))
paths.resolve = lambda name, *_, **__: paths.Found(Path(name))
FILE, SOURCE = FOLDER / "a.safetensors", FOLDER / "kind.safetensors"
SUFFIXES = {
    "kohya": (".lora_down.weight", ".lora_up.weight", True),
    "peft": (".lora_A.weight", ".lora_B.weight", False),
    "peft, default": (".lora_A.default.weight", ".lora_B.default.weight", False),
    "old diffusers": (".lora.down.weight", ".lora.up.weight", True),
}
KERNELS, WAN_FUN = "kohya, kernels of one on linear layers", "kohya, as some Wan trainers write it"


def differences(patcher):
    """Weight key -> what the patches add to it."""
    state = patcher.model.state_dict()
    found = {}
    for key, patches in patcher.patches.items():
        weight = state[key].float()
        found[key] = comfy.lora.calculate_weight(patches, weight.clone(), key) - weight
    return {key: value for key, value in found.items() if bool(value.any())}


def by_the_host(model, file):
    tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
    return differences(comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 1.0)[0])


def opened(model, file):
    return loras.open_lora(str(file), None, model, None).adapter


def by_ours(model, adapter):
    return differences(applying.apply(adapter, model, None, 1.0, 1.0, "merged").model)


def differ(one, two, tolerance=1e-5):
    """The first weight of which two tables say something else; None where they are the same."""
    for key in sorted(one.keys() | two.keys()):
        if key not in one or key not in two:
            return f"{key}: only {'the first' if key in one else 'the second'} changes it"
        size = one[key].norm()
        if (one[key] - two[key]).norm() > tolerance * size:
            return f"{key}: {float((one[key] - two[key]).norm() / size):.1e} of the change"
    return None


def target(value):
    """(key, dimension, start, length) of a map's value."""
    key, offset = (value, None) if isinstance(value, str) else (value[0], value[1])
    return key, offset


def lora(name, shape, style, generator):
    down, up, has_alpha = SUFFIXES.get(style, SUFFIXES["kohya"])
    if style == WAN_FUN:
        name = name.replace("lora_unet_", "lora_unet__", 1)
    inner = (1, 1) if style == KERNELS and len(shape) == 2 else shape[2:]
    found = {
        name + down: torch.randn(2, shape[1], *inner, generator=generator) * 0.1,
        name + up: torch.randn(shape[0], 2, *(1,) * len(inner), generator=generator) * 0.1,
    }
    return found | ({f"{name}.alpha": torch.tensor(1.0)} if has_alpha else {})
