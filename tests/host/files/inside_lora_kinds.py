"""Inside a host: every kind of adapter that its Load LoRA reads, on the embedded model, and every way of
using one here, against what Load LoRA does with the same file.

Prints lines of JSON: each kind's relative differences.
"""

import json

import comfy.lora
import comfy.sd
import comfy.utils
import torch
from inside_apply_lib import condition, pack, predict
from inside_lora_lib import FILE, SOURCE, applying, by_ours, by_the_host, differ, lora, opened, target
from inside_train_lib import RUNS
from safetensors.torch import save_file

fusion, schedule = pack("spectral_core.fusion"), pack("spectral_core.adapter.schedule")
export, errors = pack("spectral_core.files.lora_export"), pack("spectral_core.errors")
distil_node, events = pack("nodes.distil").DistilAdapters, pack("spectral_core.training.runs.events")
CLOSE = 1e-5


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


def predicted(patcher):
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    return predict(patcher, latent, torch.tensor([3.0]), condition()[0][0])[2]


def by_file(model, strength=1.0):
    """What the model predicts with the file that lies in ``SOURCE``, by the host's Load LoRA."""
    tensors = comfy.utils.load_torch_file(str(SOURCE), safe_load=True)
    return predicted(comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0])


def live(model, adapter, strength=1.0):
    return predicted(applying.apply(adapter, model, None, strength, 1.0, "live").model)


def apart(one, two):
    return float((one - two).norm() / two.norm())


def paths_of(model, adapter, theirs, ours, exported):
    """Each way of using an adapter -> how far it is from what the host's Load LoRA does, relative."""

    def of_weights(table):
        return max(apart(table[k], theirs[k]) for k in theirs)

    base, whole, half = predicted(model), by_file(model), by_file(model, 0.5)
    assert apart(base, whole) > 1e-4, "the kind does nothing here"
    fused = fusion.fuse([adapter, adapter], weights=[0.25, 0.75]).adapter
    steady = adapter.with_schedule(schedule.Schedule(((0.0, 0.5), (1.0, 0.5))))
    return {
        "merged": of_weights(ours),
        "live": apart(live(model, adapter), whole),
        "live at half strength": apart(live(model, adapter, 0.5), half),
        "scheduled at one half": apart(live(model, steady), half),
        "fused with itself": of_weights(by_ours(model, fused)),
        "exported": of_weights(exported),
    }


def sites_of(model):
    """A linear layer, a 1x1 and a 3x3 convolution, a layer and a group norm: (name, shape of the weight)."""
    known, state = comfy.lora.model_lora_keys_unet(model.model, {}), model.model.state_dict()
    sites = {}
    for name, value in sorted(known.items()):
        key, _ = target(value)
        weight = state.get(key)
        if not name.startswith("lora_unet_") or weight is None or weight.dim() not in (1, 2, 4):
            continue
        if weight.dim() == 1:
            kind = "layer norm" if "transformer_blocks" in name else "group norm"
            sites.setdefault(kind, (name, tuple(weight.shape)))
        elif weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0:
            sites.setdefault(weight.dim() if weight.shape[-1] != 1 else 0, (name, tuple(weight.shape)))
    return list(sites.values())


def files_of(sites):
    """Kind -> (of how many dimensions the weight is, tensors of a file), for every site."""
    generator, found = torch.Generator().manual_seed(2), {}
    for name, shape in sites:
        of_it = norm_kinds(name, shape, generator) if len(shape) == 1 else kinds(name, shape, generator)
        for kind, tensors in of_it.items():
            found.setdefault(kind, []).append((len(shape), {k: v.contiguous() for k, v in tensors.items()}))
    return found


def check_kinds(model):
    """Every kind at every site, used in every way but distilled."""
    wrong, tried = [], {}
    for kind, files in files_of(sites_of(model)).items():
        for dimensions, tensors in files:
            save_file(tensors, SOURCE)
            what, theirs = f"{kind} {dimensions}d", by_the_host(model, SOURCE)
            if not theirs:  # this version of the host does not know the kind
                tried[what] = None
                continue
            try:
                adapter = opened(model, SOURCE)
                ours = by_ours(model, adapter)
                export.export_lora(adapter, FILE, "kohya", torch.float32, overwrite=True)
                again = by_the_host(model, FILE)
            except errors.SpectralAdapterError as error:
                wrong.append(f"{what}: {error}")
                continue
            if found := differ(theirs, ours) or differ(theirs, again):
                wrong.append(f"{what}: {found}")
            row = paths_of(model, adapter, theirs, ours, again)
            # Load LoRA turns by less at half strength; ours is half of the difference: a note says so.
            law = () if "oft" not in kind else ("live at half strength", "scheduled at one half")
            far = {how: d for how, d in row.items() if how not in law and not d <= CLOSE}
            wrong += [f"{what}, {how}: {d:.1e}" for how, d in far.items()]
            tried[what] = row
    print(json.dumps({"kinds": tried}))
    return wrong


def check_distilled(model):
    """Every kind, at all sites at once, as the concept of a distillation. The student that begins as the
    concept's own fold has nothing to learn and is what Load LoRA does; one that begins at half learns it."""
    wrong, tried, clip = [], {}, pack("nodes.host.demo.model").load_clip()
    for kind, files in files_of(sites_of(model)).items():
        save_file({k: v for _, tensors in files for k, v in tensors.items()}, SOURCE)
        if not by_the_host(model, SOURCE):
            continue
        adapter = opened(model, SOURCE)
        with torch.inference_mode(False):
            half = adapter.scaled(0.5)

        def distil(word, begin, steps, rate, kind=kind, adapter=adapter):
            made, *_ = distil_node().distil(
                model, clip, adapter, adapter, f"{kind} {word}".replace(",", ""), 1.0, 0.0, steps, rate, 2,
                fused=begin, prompts="a red star\na red star", preserve="-", samples=2, sample_steps=2,
            )["result"]  # fmt: skip
            found = events.read_events(RUNS / f"{kind} {word}".replace(",", "") / events.FILE)
            return made, [event["loss"] for event in found if event["event"] == "step"]

        host = by_file(model)
        same, first = distil("same", adapter, 1, 1e-9)
        learned, losses = distil("half", half, 12, 0.0)
        _, still = distil("still", half, 12, 1e-9)
        tried[kind] = {"distilled": apart(live(model, same), host), "of half": sum(losses) / sum(still)}
        if not (tried[kind]["distilled"] <= CLOSE and first[0] <= 1e-6 * still[0]):
            wrong.append(f"{kind}, distilled: {tried[kind]}, the first loss {first[0]:.1e} of {still[0]:.1e}")
        if not tried[kind]["of half"] < 1 or learned.layers.keys() != adapter.layers.keys():
            wrong.append(f"{kind}: nothing was learned, {tried[kind]}")
    print(json.dumps({"distilled": tried}))
    return wrong


if __name__ == "__main__":
    with torch.inference_mode():
        patcher = pack("nodes.host.demo.model").load()[0]
        before = {key: value.clone() for key, value in patcher.model.state_dict().items()}
        trouble = check_kinds(patcher) + check_distilled(patcher)
        after = patcher.model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert not trouble, "\n".join(trouble)
