"""Inside a host: other people's LoRA files. For every name in the host's map and every style of file: what
the host's Load LoRA does with it is what ours does, and what the host does with our export.

Arguments: a folder, then names of families, or ``demo`` for the embedded model. Prints lines of JSON for
each: names tried and files written, then biases and norms.
"""

import json
import sys

import comfy.lora
import torch
from inside_apply_lib import pack
from inside_catalogue import CATALOGUE
from inside_lora_lib import (
    FILE,
    KERNELS,
    SOURCE,
    SUFFIXES,
    WAN_FUN,
    applying,
    by_ours,
    by_the_host,
    differ,
    lora,
    loras,
    opened,
    target,
)
from safetensors.torch import save_file

places, stack = pack("nodes.host.model.places"), pack("nodes.host.apply.stack")
fitting = pack("nodes.host.files.fitting")
export, errors = pack("spectral_core.files.lora_export"), pack("spectral_core.errors")


def batches(model):
    """Names in groups, each of which names no weight twice."""
    state, groups = model.model.state_dict(), []
    for name, value in sorted(comfy.lora.model_lora_keys_unet(model.model, {}).items()):
        key, offset = target(value)
        weight = state.get(key)
        if weight is None or weight.dim() < 2 or not key.endswith(".weight"):
            continue
        if offset is not None and offset[1] + offset[2] > weight.shape[offset[0]]:
            continue  # the host's own map is wrong for this shape, and its loader fails on it
        shape = tuple(weight.shape if offset is None else weight.narrow(*offset).shape)
        for group in groups:
            if all(key != other or (offset and theirs and offset != theirs and disjoint(offset, theirs))
                   for other, theirs, _ in group.values()):  # fmt: skip
                group[name] = key, offset, shape
                break
        else:
            groups.append({name: (key, offset, shape)})
    return groups


def disjoint(one, two):
    return one[0] == two[0] and (one[1] + one[2] <= two[1] or two[1] + two[2] <= one[1])


def styles_of(number, group):
    """The styles in which a group of names is written; the rare ones once a family."""
    more = [KERNELS] if number == 0 else []
    if "lora_unet_blocks_0_cross_attn_k" in group:  # by this name the host knows the style
        more.append(WAN_FUN)
    return [*SUFFIXES, *more]


def check_names(family, model):
    generator, wrong, names, files = torch.Generator().manual_seed(1), [], 0, 0
    for number, group in enumerate(batches(model)):
        for style in styles_of(number, group):
            tensors = {}
            for name, (key, _, shape) in group.items():
                is_linear = hasattr(places.module_at(model.model, key.removesuffix(".weight")), "in_features")
                tensors |= lora(
                    name, shape, "kohya" if style == KERNELS and not is_linear else style, generator
                )
            save_file({k: v.contiguous() for k, v in tensors.items()}, FILE)
            theirs = by_the_host(model, FILE)
            names, files = names + len(group), files + 1
            try:
                adapter = opened(model, FILE)
                if found := differ(theirs, by_ours(model, adapter)):
                    wrong.append(f"{family}, group {number}, {style}: ours: {found}")
                if style == "kohya":
                    save_file({k: v.contiguous() for k, v in tensors.items()}, SOURCE)
                    wrong += [f"{family}, group {number}: {w}" for w in exports(model, adapter, theirs)]
            except errors.SpectralAdapterError as error:
                wrong.append(f"{family}, group {number}, {style}: {error}")
    print(json.dumps({"family": family, "names": names, "files": files, "wrong": len(wrong)}))
    return wrong


def exports(model, adapter, theirs):
    """What the host does with our export is what it did with the file (in ``SOURCE``): of the fitted adapter
    and of the file as it is read without the model, each exported with the model and without."""
    alone, wrong = loras.open_lora(str(SOURCE), None, None, None).adapter, []
    for read, of in (("fitted", adapter), ("read alone", alone)):
        for how, named in (("", fitting.file_names(of, model)), (" without the model", None)):
            try:
                export.export_lora(of, FILE, "kohya", torch.float32, overwrite=True, names=named)
            except errors.SpectralAdapterError as error:
                if named is None and "connect the model" in str(error):
                    continue  # rows of a fused weight
                wrong.append(f"{read}, the export{how}: {error}")
                continue
            if found := differ(theirs, by_the_host(model, FILE)):
                wrong.append(f"{read}, the export{how}: {found}")
    return wrong


def vectors(model, generator):
    """Name -> differences of its vectors, as LoRA files hold them: biases of layers, weights and biases of
    norms in both spellings; each vector once."""
    state, found, seen = model.model.state_dict(), {}, set()
    for name, key in sorted(comfy.lora.model_lora_keys_unet(model.model, {}).items()):
        if not isinstance(key, str) or not key.endswith(".weight") or key in seen or key not in state:
            continue
        seen.add(key)
        sizes = {"weight": state[key].shape} if state[key].dim() == 1 else {}
        bias = key.removesuffix("weight") + "bias"
        sizes |= {"bias": state[bias].shape} if bias in state else {}
        spelling = {"weight": ".w_norm", "bias": ".b_norm"} if len(seen) % 2 and "weight" in sizes else {}
        spelling = spelling or {"weight": ".diff", "bias": ".diff_b"}
        for parameter, size in sizes.items():
            found[name + spelling[parameter]] = torch.randn(size, generator=generator) * 0.2
    return found


def check_vectors(family, model):
    """Biases and norms: what the host does with the file, what ours does, and the host with our export."""
    tensors = vectors(model, torch.Generator().manual_seed(3))
    if not tensors:
        return []
    save_file(tensors, SOURCE)
    theirs = by_the_host(model, SOURCE)
    try:
        adapter = opened(model, SOURCE)
        wrong = [differ(theirs, by_ours(model, adapter))]
        export.export_lora(adapter, FILE, "kohya", torch.float32, overwrite=True)
        wrong.append(differ(theirs, by_the_host(model, FILE)))
    except errors.SpectralAdapterError as error:
        wrong = [str(error)]
    print(json.dumps({"family": family, "vectors": len(tensors), "changed": len(theirs)}))
    return [f"{family}, biases and norms: {why}" for why in wrong if why]


def check_convolutions(family, model):
    """Grouped and transposed convolutions: a live update is what the host's merged one makes of each."""
    modules = {
        name: module
        for name, module in model.model.named_modules()
        if hasattr(module, "kernel_size")
        and getattr(module, "weight", None) is not None
        and (getattr(module, "groups", 1) != 1 or getattr(module, "transposed", False))
    }
    if not modules:
        return []
    generator, tensors = torch.Generator().manual_seed(4), {}
    for name, module in modules.items():
        tensors |= lora(name, tuple(module.weight.shape), "peft", generator)
    save_file({k: v.contiguous() for k, v in tensors.items()}, SOURCE)
    theirs = by_the_host(model, SOURCE)
    live = applying.apply(opened(model, SOURCE), model, None, 1.0, 1.0, "live").model
    far = 0.0
    for name, module in modules.items():
        x = torch.randn(2, module.in_channels, *[9] * len(module.kernel_size), generator=generator)
        with stack.stack_of(live).on(live.model):
            ours = module(x)
        base, kept = module(x), module.weight.clone()
        module.weight.data.add_(theirs[f"{name}.weight"])
        whole = module(x)
        module.weight.data.copy_(kept)
        far = max(far, float((ours - whole).norm() / (whole - base).norm()))
    print(json.dumps({"family": family, "convolutions": len(modules), "live": far}))
    return [] if far <= 1e-5 else [f"{family}, grouped and transposed convolutions live: {far:.1e}"]


if __name__ == "__main__":
    trouble = []
    with torch.inference_mode():
        for family in sys.argv[3:]:
            is_demo = family == "demo"
            if not is_demo and not CATALOGUE[family].exists():
                continue
            patcher = pack("nodes.host.demo.model").load()[0] if is_demo else CATALOGUE[family].patcher()
            before = {key: value.clone() for key, value in patcher.model.state_dict().items()}
            trouble += check_names(family, patcher)
            trouble += check_vectors(family, patcher)
            trouble += check_convolutions(family, patcher)
            after = patcher.model.state_dict()
            assert all(torch.equal(before[key], after[key]) for key in before), family
    assert not trouble, "\n".join(trouble)
