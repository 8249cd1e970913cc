"""Inside a host: other people's LoRA files. For every name in the host's map, every style of file and every
kind of adapter: what the host's Load LoRA does with it is what ours does, and what the host does with our
export.

Prints one line of JSON a family: names tried, files written, and each kind's largest difference.
"""

import json
import sys
from pathlib import Path

import comfy.lora
import comfy.sd
import comfy.utils
import torch
from inside_apply_lib import FOLDER, condition, pack, predict
from inside_models import FAMILIES
from safetensors.torch import save_file

loras, paths, applying = (pack(f"nodes.host.{n}") for n in ("files.loras", "files.paths", "apply.adapters"))
fitting, fusion = pack("nodes.host.files.fitting"), pack("spectral_core.fusion")
schedule = pack("spectral_core.adapter.schedule")
export, errors = pack("spectral_core.files.lora_export"), pack("spectral_core.errors")
paths.resolve = lambda name, *_, **__: paths.Found(Path(name))
FILE, SOURCE = FOLDER / "a.safetensors", FOLDER / "kind.safetensors"
SUFFIXES = {
    "kohya": (".lora_down.weight", ".lora_up.weight", True),
    "peft": (".lora_A.weight", ".lora_B.weight", False),
    "peft, default": (".lora_A.default.weight", ".lora_B.default.weight", False),
    "old diffusers": (".lora.down.weight", ".lora.up.weight", True),
}


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


def lora(name, shape, style, generator):
    down, up, has_alpha = SUFFIXES[style]
    inner = shape[2:]
    found = {
        name + down: torch.randn(2, shape[1], *inner, generator=generator) * 0.1,
        name + up: torch.randn(shape[0], 2, *(1,) * len(inner), generator=generator) * 0.1,
    }
    return found | ({f"{name}.alpha": torch.tensor(1.0)} if has_alpha else {})


def check_names(family, model):
    generator, wrong, names, files = torch.Generator().manual_seed(1), [], 0, 0
    for number, group in enumerate(batches(model)):
        for style in SUFFIXES:
            tensors = {}
            for name, (_, _, shape) in group.items():
                tensors |= lora(name, shape, style, generator)
            save_file({k: v.contiguous() for k, v in tensors.items()}, FILE)
            theirs = by_the_host(model, FILE)
            names, files = names + len(group), files + 1
            try:
                adapter = opened(model, FILE)
                if found := differ(theirs, by_ours(model, adapter)):
                    wrong.append(f"{family}, group {number}, {style}: ours: {found}")
                if style == "kohya":
                    named = fitting.file_names(adapter, model)
                    export.export_lora(adapter, FILE, "kohya", torch.float32, overwrite=True, names=named)
                    if found := differ(theirs, by_the_host(model, FILE)):
                        wrong.append(f"{family}, group {number}: the export: {found}")
            except errors.SpectralAdapterError as error:
                wrong.append(f"{family}, group {number}, {style}: {error}")
    print(json.dumps({"family": family, "names": names, "files": files, "wrong": len(wrong)}))
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


def kinds(name, shape, generator):
    """Files of every kind that the host reads, for one weight."""

    def part(**shapes):
        return {f"{name}.{k}": torch.randn(*v, generator=generator) * 0.2 for k, v in shapes.items()}

    out, fan_in, inner = shape[0], shape[1], shape[2:]
    flat = fan_in * (inner[0] * inner[1] if inner else 1)
    alpha = {f"{name}.alpha": torch.tensor(1.5)}
    plain = lora(name, shape, "kohya", generator)
    scale = {f"{name}.dora_scale": torch.rand(out, *(1,) * (len(shape) - 1), generator=generator) + 0.5}
    loha = part(hada_w1_a=(out, 2), hada_w1_b=(2, flat), hada_w2_a=(out, 2), hada_w2_b=(2, flat)) | alpha
    kron = part(lokr_w1=(4, 4), lokr_w2_a=(out // 4, 2), lokr_w2_b=(2, flat // 4)) | alpha
    found = {
        "lora": plain,
        "loha": loha,
        "lokr": kron,
        "lokr, whole": part(lokr_w1=(2, 2), lokr_w2=(out // 2, fan_in // 2, *inner)) | alpha,
        "difference": part(diff=shape),
        "bias": part(diff_b=(out,)),
        "dora": plain | scale,
        "dora of loha": loha | scale,
        "oft": part(oft_blocks=(out // 4, 4, 4)) | {f"{name}.alpha": torch.tensor(1.0)},
        "boft": part(oft_blocks=(2, out // 4, 4, 4)) | {f"{name}.alpha": torch.tensor(1.0)},
    }
    if not inner:
        a, b = (2, out), (out, 2)
        found["glora"] = {
            f"{name}.{k}.weight": torch.randn(*v, generator=generator) * 0.2
            for k, v in {"a1": (2, fan_in), "a2": (fan_in, 2), "b1": (2, fan_in), "b2": b}.items()
        } | alpha
        del a
    return found


def norm_kinds(name, size, generator):
    """A norm's differences in both spellings."""
    weight, bias = (torch.randn(size, generator=generator) * 0.2 for _ in range(2))
    return {
        "norm": {f"{name}.w_norm": weight, f"{name}.b_norm": bias},
        "norm, as differences": {f"{name}.diff": weight, f"{name}.diff_b": bias},
    }


def paths_of(model, adapter, theirs, ours, exported):
    """Each way of using an adapter -> how far it is from what the host's Load LoRA does, relative."""
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    context = condition()[0][0]

    def predicted(patcher):
        return predict(patcher, latent, torch.tensor([3.0]), context)[2]

    def host(strength):
        tensors = comfy.utils.load_torch_file(str(SOURCE), safe_load=True)
        return predicted(comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0])

    def live(adapter, strength=1.0):
        return predicted(applying.apply(adapter, model, None, strength, 1.0, "live").model)

    def of_weights(table):
        return max(float((theirs[k] - table[k]).norm() / theirs[k].norm()) for k in theirs)

    base, whole, half = predicted(model), host(1.0), host(0.5)
    assert (whole - base).norm() > 1e-4 * base.norm(), "the kind does nothing here"
    fused = fusion.fuse([adapter, adapter], weights=[0.25, 0.75]).adapter
    steady = adapter.with_schedule(schedule.Schedule(((0.0, 0.5), (1.0, 0.5))))
    return {
        "merged": of_weights(ours),
        "live": float((live(adapter) - whole).norm() / whole.norm()),
        "live at half strength": float((live(adapter, 0.5) - half).norm() / half.norm()),
        "scheduled at one half": float((live(steady) - half).norm() / half.norm()),
        "fused with itself": of_weights(by_ours(model, fused)),
        "exported": of_weights(exported),
    }


def check_kinds(family, model):
    """Every kind on a linear layer and a convolution: merged, and exported as a LoRA for the host."""
    generator, wrong, tried = torch.Generator().manual_seed(2), [], {}
    known, state = comfy.lora.model_lora_keys_unet(model.model, {}), model.model.state_dict()
    sites = {}
    for name, value in sorted(known.items()):
        key, _ = target(value)
        weight = state.get(key)
        if not name.startswith("lora_unet_") or weight is None or weight.dim() not in (1, 2, 4):
            continue
        if weight.dim() == 1:  # one group norm, one layer norm
            kind = "layer norm" if "transformer_blocks" in name else "group norm"
            sites.setdefault(kind, (name, tuple(weight.shape)))
            continue
        if weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0:
            sites.setdefault(weight.dim() if weight.shape[-1] != 1 else 0, (name, tuple(weight.shape)))
    for name, shape in sites.values():
        of_it = norm_kinds(name, shape, generator) if len(shape) == 1 else kinds(name, shape, generator)
        for kind, tensors in of_it.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, SOURCE)
            theirs = by_the_host(model, SOURCE)
            if not theirs:  # this version of the host does not know the kind
                tried[f"{kind} {len(shape)}d"] = None
                continue
            try:
                adapter = opened(model, SOURCE)
                ours = by_ours(model, adapter)
                export.export_lora(adapter, FILE, "kohya", torch.float32, overwrite=True)
                again = by_the_host(model, FILE)
            except errors.SpectralAdapterError as error:
                wrong.append(f"{family}, {kind} {shape}: {error}")
                continue
            found = differ(theirs, ours) or differ(theirs, again)
            if found:
                wrong.append(f"{family}, {kind} {shape}: {found}")
            row = paths_of(model, adapter, theirs, ours, again)
            # Load LoRA turns by less at half strength; ours is half of the difference: a note says so.
            law = () if "oft" not in kind else ("live at half strength", "scheduled at one half")
            found = {how: d for how, d in row.items() if how not in law and not d <= 1e-5}
            wrong += [f"demo, {kind} {shape}, {how}: {d:.1e}" for how, d in found.items()]
            tried[f"{kind} {len(shape)}d"] = row
    print(json.dumps({"family": family, "kinds": tried}))
    return wrong


if __name__ == "__main__":
    chosen = sys.argv[3:] or ["demo", *(name for name, family in FAMILIES.items() if family.exists())]
    trouble = []
    with torch.inference_mode():
        for family in chosen:
            is_demo = family == "demo"
            patcher = pack("nodes.host.demo.model").load()[0] if is_demo else FAMILIES[family].patcher()
            before = {key: value.clone() for key, value in patcher.model.state_dict().items()}
            trouble += check_names(family, patcher)
            trouble += check_vectors(family, patcher)
            if is_demo:
                trouble += check_kinds(family, patcher)
            after = patcher.model.state_dict()
            assert all(torch.equal(before[key], after[key]) for key in before), family
    assert not trouble, "\n".join(trouble)
