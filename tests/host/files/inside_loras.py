"""Inside a host: a ``LORA_MODEL`` as the host's own trainer makes it, read by Load LoRA as Adapter."""

import comfy.sd
import torch
from comfy.weight_adapter import adapter_maps
from inside_apply_lib import FOLDER, condition, leftovers, pack, predict

nodes = pack("nodes").NODE_CLASS_MAPPINGS
error = pack("spectral_core.errors").SpectralAdapterError

SIZES = {"LoRA": 0.1, "LoHa": 0.5, "LoKr": 0.3, "OFT": 0.1}  # of the factors, so that each kind shows


def trained(patcher, algorithm="LoRA"):
    """What Train LoRA returns: its parts for every module with weights, here moved off their start."""
    found = {}
    generator = torch.Generator().manual_seed(1)
    for name, module in patcher.model.named_modules():
        if not hasattr(module, "weight_function") or getattr(module, "weight", None) is None:
            continue
        if module.weight.dim() >= 2:
            made = adapter_maps[algorithm].create_train(module.weight, rank=2, alpha=1.0)
            for part, parameter in made.named_parameters():
                moved = torch.randn(parameter.shape, generator=generator) * SIZES[algorithm]
                found[f"{name}.{part}"] = moved if parameter.dim() else parameter.detach()
        else:
            found[f"{name}.diff"] = torch.zeros(module.weight.shape)
        if module.bias is not None:
            found[f"{name}.diff_b"] = torch.zeros(module.bias.shape)
    return found


def changed(patcher, context):
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    return predict(patcher, x, torch.tensor([3.0]), context)[2]


with torch.inference_mode():
    model, clip, _ = pack("nodes.host.demo.model").load()
    context = condition()[0][0]
    tensors = trained(model)
    convolutions = [n for n in tensors if n.endswith("in_layers.2.lora_down.weight")]
    assert convolutions and tensors[convolutions[0]].dim() == 2, "the trainer keeps no kernels"
    adapter, report, _ = nodes["SpectralAdapters_LoadLoRAAsAdapter"]().load("none", tensors, model)["result"]
    assert "change nothing" in report, report
    assert len(adapter.layers) == sum(name.endswith("lora_up.weight") for name in tensors)
    assert not [name for name in adapter.layers if not name.startswith("unet.")], "our own names, for fusing"
    apply = nodes["SpectralAdapters_ApplyAdapter"]()
    base = changed(model, context)
    theirs = changed(comfy.sd.load_lora_for_models(model, None, tensors, 0.7, 0)[0], context)
    for mode in ("merged", "live"):
        ours = changed(apply.apply(adapter, 0.7, 1.0, mode, model=model)["result"][0], context)
        assert (theirs - base).abs().max() > 1e-2 * base.abs().max()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), mode
    assert torch.equal(changed(model, context), base) and not leftovers(model.model)
    try:
        nodes["SpectralAdapters_LoadLoRAAsAdapter"]().load("none", tensors)
        raise AssertionError("kernels are not in it: the model is needed")
    except error as refused:
        assert "connect the model" in str(refused)

    # the trainer's other kinds, at the strength at which they all mean the same
    for algorithm in ("LoHa", "LoKr", "OFT"):
        tensors = trained(model, algorithm)
        adapter, *_ = nodes["SpectralAdapters_LoadLoRAAsAdapter"]().load("none", tensors, model)["result"]
        theirs = changed(comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0)[0], context)
        ours = changed(apply.apply(adapter, 1.0, 1.0, "merged", model=model)["result"][0], context)
        assert (theirs - base).abs().max() > 1e-2 * base.abs().max(), algorithm
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), algorithm
        if algorithm == "OFT":
            try:
                nodes["SpectralAdapters_LoadLoRAAsAdapter"]().load("none", tensors)
                raise AssertionError("it changes the weight it finds: the model is needed")
            except error as refused:
                assert "connect the model" in str(refused)

    # words, base and cover where the host's own model browser looks
    from PIL import Image

    export = pack("spectral_core.files.lora_export").export_lora
    file = FOLDER / "shown.safetensors"
    said = adapter.with_provenance(trigger_words=("qbot", "a robot"), family="sdxl")
    assert not export(said, file).omitted
    pack("spectral_core.files.cover").write_cover(file, Image.new("RGB", (64, 64), "red"))
    try:
        from app.assets.services.metadata_extract import extract_file_metadata
    except ImportError:  # hosts before 0.28
        extract_file_metadata = None
    if extract_file_metadata is not None:
        seen = extract_file_metadata(str(file))
        assert seen.trained_words == ["a robot", "qbot"] and seen.base_model == "sdxl_base_v1-0", seen
    from app.model_manager import ModelFileManager

    assert ModelFileManager().get_model_previews(str(file)) == [str(file.with_suffix(".preview.png"))]
