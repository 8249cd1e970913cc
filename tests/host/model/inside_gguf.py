"""Inside a host: a small Flux as GGUF, through ComfyUI-GGUF's own loader: its weights are read, it trains.

$COMFYUI_GGUF: the folder of that pack; behind a colon folders where its packages (gguf) lie, if elsewhere.
"""

import importlib.util
import json
import os
import shutil
import sys
import traceback

import comfy.model_management
import torch
from inside_apply_lib import FOLDER, leftovers, pack
from inside_apply_models import LORA, methods, new
from inside_family import Family
from inside_models import FLUX
from inside_quantised import losses
from inside_train_lib import RUNS, SAVED, train

applying = pack("nodes.host.apply.adapters")
adapter_file = pack("spectral_core.files.adapter_file")
compat = pack("nodes.host.model.compat")
layers = pack("nodes.host.training.layers")
model = pack("nodes.host.training.model")

KINDS = ("Q8_0", "Q4_0")
SIZES = {"hidden_size": 128, "num_heads": 1, "axes_dim": [16, 56, 56], "context_in_dim": 64, "vec_in_dim": 64}
FAMILY = Family("Flux", FLUX | SIZES, (1, 16, 8, 8), 64, pooled=64)  # what the loader tells from the file


def loader():
    """ComfyUI-GGUF's node."""
    where, *more = os.environ["COMFYUI_GGUF"].split(os.pathsep)
    sys.path += more
    import utils.install_util  # noqa: F401  the host's, before a package of that name in one of the folders

    init = os.path.join(where, "__init__.py")
    spec = importlib.util.spec_from_file_location("gguf_pack", init, submodule_search_locations=[where])
    made = importlib.util.module_from_spec(spec)
    sys.modules["gguf_pack"] = made
    spec.loader.exec_module(made)
    return made.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]()


def written(kind):
    """The family's weights in a file, most of them quantised; layer -> its numbers as they are in it."""
    import gguf

    form = getattr(gguf.GGMLQuantizationType, kind)
    path, numbers = FOLDER / f"small_{kind}.gguf", {}
    writer = gguf.GGUFWriter(str(path), "flux")
    for key, value in FAMILY.patcher().model.diffusion_model.state_dict().items():
        plain = value.float().numpy()
        if value.dim() == 2 and any(step.isdigit() for step in key.split(".")) and not value.shape[1] % 32:
            packed = gguf.quants.quantize(plain, form)
            writer.add_tensor(key, packed, raw_dtype=form)
            numbers[key] = torch.from_numpy(gguf.quants.dequantize(packed, form).copy())
        else:
            writer.add_tensor(key, plain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, numbers


def check(kind, node):
    import folder_paths

    path, numbers = written(kind)
    folder_paths.folder_names_and_paths["unet_gguf"][0].append(str(FOLDER))
    family, (patcher,) = FAMILY, node.load_unet(path.name)
    if patcher.model.model_config.unet_config["hidden_size"] != SIZES["hidden_size"]:
        raise FullSizeOnlyError("this host takes every Flux for a full-size one")
    base = family.sampled(patcher)
    chosen = layers.chosen(patcher, "attention+mlp")[0]
    weights = dict(layers.BaseWeights(patcher, chosen))
    assert len(set(chosen) & {f"diffusion_model.{k.removesuffix('.weight')}" for k in numbers}) > 4
    for name, weight in weights.items():
        key = f"{name.removeprefix('diffusion_model.')}.weight"
        if key in numbers:
            assert torch.allclose(weight, numbers[key], rtol=2e-3, atol=1e-3), name

    def same():
        assert torch.equal(family.sampled(patcher), base), "another base picture"
        assert leftovers(patcher.model) == []

    patched = applying.apply(new(weights, LORA, size=0.2), patcher, None, 1.0, 1.0, "merged").model
    family.sampled(patched)
    one = next(iter(weights))
    again = compat.original_weight(patched, f"{one}.weight", torch.device("cpu"))
    assert torch.equal(again, weights[one]), "read with what is merged into it"
    spectral = new({n: weights[n] for n in list(weights)[:4]}, methods.SpectralAConfig((0, 1, 2)), size=0.05)
    for mismatch in ("delta", "rebase", "strict"):
        applying.apply(spectral, patcher, None, 1.0, 1.0, "auto", mismatch)
    for method in ("lora", "foura", "spectral_a"):
        for folder in (SAVED, RUNS):
            shutil.rmtree(folder, ignore_errors=True)
        given = {"latents": {"samples": family.noise(2, 5)}, "conditioning": [family.words(7)]}
        given |= {"method": method, "targets": "attention+mlp", "steps": 10, "batch_size": 1}
        adapter = train(patcher, run_name="learns", **given)[0]
        train(patcher, run_name="does not", **{**given, "learning_rate": 1e-9})
        learned, still = sum(losses("learns")[-5:]), sum(losses("does not")[-5:])
        assert learned < still, f"{method}: {still} to {learned}"
        read = adapter_file.load(SAVED / "learns.safetensors")
        drawn = [family.sampled(applying.apply(a, patcher, None, 1.0, 1.0).model) for a in (adapter, read)]
        assert torch.equal(*drawn) and not torch.equal(drawn[0], base), "the file acts differently"
        same()
    with model.ready(patcher, "auto", family.noise().shape) as ready:
        rows = model.Conditions(ready.patcher, {0: family.words(7)[0]}, [family.noise()[0]])
        noisy = family.noise().requires_grad_()
        with pack("spectral_core.training.engine.checkpointing").checkpointed(
            [ready.root], "none", recast=ready.streams.again
        ):
            found = model.Denoiser(ready, rows)(noisy, torch.tensor([500]), [0])
            alive = [ref for ref, _ in ready.streams._made.values() if not ref.expired()]
            found.square().mean().backward()
        assert ready.streams._made and not alive, f"{len(alive)} unpacked weights are kept"
    same()
    print(f"  {kind}: {len(numbers)} packed weights")


class FullSizeOnlyError(Exception):
    """The host does not read the sizes of the model from its file."""


def main():
    report = {}
    try:
        node = loader()
    except ImportError as error:
        (FOLDER / "gguf.json").write_text(json.dumps({"missing": str(error)}), encoding="utf-8")
        return
    for kind in KINDS:
        try:
            with torch.inference_mode():
                check(kind, node)
            report[kind] = ""
        except FullSizeOnlyError as error:
            report["missing"] = str(error)
            break
        except Exception as error:
            report[kind] = traceback.format_exc()
            print(f"  {kind}: FAILED {type(error).__name__}: {str(error)[:300]}")
        comfy.model_management.unload_all_models()
    (FOLDER / "gguf.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
