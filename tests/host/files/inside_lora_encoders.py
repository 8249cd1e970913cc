"""Inside a host: LoRA files for text encoders. For every name in the host's map: what its Load LoRA does with
the file is what ours does, and what the host does with our export, read with the CLIP and without.

The encoders are trees with the layers' names of the real ones, which is all that the host's map asks for.
SDXL's refiner is left out: its one encoder is SDXL's second, which kohya's names call the first there.
Prints lines of JSON.
"""

import json

import comfy.lora
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from inside_apply_lib import pack
from inside_lora_lib import FILE, SOURCE, applying, differ, differences, lora, loras
from safetensors.torch import save_file
from torch import nn

export, errors = pack("spectral_core.files.lora_export"), pack("spectral_core.errors")
STYLES = ("kohya", "peft")


def clip_layers(prefix, width):
    """Names and modules of a CLIP text encoder."""
    found = {"embeddings.token_embedding": nn.Embedding(20, width), "final_layer_norm": nn.LayerNorm(width)}
    for layer in (f"encoder.layers.{i}" for i in range(2)):
        found |= {f"{layer}.self_attn.{w}_proj": nn.Linear(width, width) for w in ("q", "k", "v", "out")}
        found |= {
            f"{layer}.mlp.fc1": nn.Linear(width, 2 * width),
            f"{layer}.mlp.fc2": nn.Linear(2 * width, width),
        }
        found |= {f"{layer}.layer_norm{i}": nn.LayerNorm(width) for i in (1, 2)}
    found = {f"{prefix}.transformer.text_model.{name}": module for name, module in found.items()}
    return found | {f"{prefix}.transformer.text_projection": nn.Linear(width, width, bias=False)}


def other_layers(prefix, *names):
    return {f"{prefix}.transformer.{name}": nn.Linear(8, 12, bias=False) for name in names}


L, G, H = clip_layers("clip_l", 8), clip_layers("clip_g", 12), clip_layers("clip_h", 16)
T5 = other_layers("t5xxl", "shared", *(f"encoder.block.{i}.layer.0.SelfAttention.q" for i in range(2)))
BERT = other_layers("hydit_clip", "bert.encoder.layer.0.attention.self.query", "bert.pooler.dense")
QWEN = other_layers("qwen3_4b", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
ENCODERS = {
    "sd1": L, "sd2": H, "sdxl": L | G, "sd3": L | G | T5, "flux": L | T5, "hunyuan-dit": BERT,
    "qwen": QWEN,
}  # fmt: skip


def clip_of(layers):
    """The host's CLIP around these layers."""
    root = nn.Module()
    for name, module in layers.items():
        tree, *path = root, *name.split(".")
        for step in path[:-1]:
            tree = tree._modules.setdefault(step, nn.Module())
        tree._modules[path[-1]] = module
    clip, cpu = comfy.sd.CLIP(no_init=True), torch.device("cpu")
    clip.cond_stage_model = root
    clip.patcher = comfy.model_patcher.ModelPatcher(root, load_device=cpu, offload_device=cpu)
    clip.tokenizer = clip.layer_idx = clip.apply_hooks_to_conds = None
    clip.tokenizer_options, clip.use_clip_schedule = {}, False
    return clip


def by_the_host(clip, file):
    tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
    return differences(comfy.sd.load_lora_for_models(None, clip, tensors, 1.0, 1.0)[1].patcher)


def by_ours(clip, adapter):
    return differences(applying.apply(adapter, None, clip, 1.0, 1.0, "merged").clip.patcher)


def batches(clip):
    """Names in groups, each of which names no weight twice."""
    state, groups = clip.cond_stage_model.state_dict(), []
    for name, key in sorted(comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}).items()):
        group = next((group for group in groups if key not in group.values()), None)
        if group is None:
            group = {}
            groups.append(group)
        group[name] = key
    return state, groups


def tensors_of(group, state, style, generator):
    """A file's tensors for these names: factors, and the differences of biases and norms."""
    found = {}
    for name, key in group.items():
        weight, bias = state[key], state.get(key.removesuffix("weight") + "bias")
        if weight.dim() > 1:
            found |= lora(name, tuple(weight.shape), style, generator)
        else:
            found[f"{name}.diff"] = torch.randn(weight.shape, generator=generator)
        if bias is not None:
            found[f"{name}.diff_b"] = torch.randn(bias.shape, generator=generator)
    return {k: v.contiguous() for k, v in found.items()}


def check(family, clip):
    generator, wrong, names, files = torch.Generator().manual_seed(1), [], 0, 0
    state, groups = batches(clip)
    for number, group in enumerate(groups):
        for style in STYLES:
            save_file(tensors_of(group, state, style, generator), SOURCE)
            theirs, place = by_the_host(clip, SOURCE), f"{family}, group {number}, {style}"
            names, files = names + len(group), files + 1
            try:
                fitted = loras.open_lora(str(SOURCE), None, None, clip).adapter
                alone = loras.open_lora(str(SOURCE), None, None, None).adapter
                for how, adapter in (("fitted", fitted), ("read alone", alone)):
                    wrong.append((f"{place}, {how}", differ(theirs, by_ours(clip, adapter))))
                    export.export_lora(adapter, FILE, "kohya", torch.float32, overwrite=True)
                    found = differ(theirs, by_the_host(clip, FILE))
                    wrong.append((f"{place}, {how}: the export", found))
            except errors.SpectralAdapterError as error:
                wrong.append((place, str(error)))
    wrong = [f"{place}: {why}" for place, why in wrong if why]
    print(json.dumps({"family": family, "names": names, "files": files, "wrong": len(wrong)}))
    return wrong


if __name__ == "__main__":
    with torch.inference_mode():
        trouble = [why for family, layers in ENCODERS.items() for why in check(family, clip_of(layers))]
    assert not trouble, "\n".join(trouble)
