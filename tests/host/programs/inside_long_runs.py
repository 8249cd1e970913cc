"""Inside a host: load, apply, sample and unload, many times; what the process has is written down.

The adapters take turns in their kind and in how they are applied; every cycle makes its objects anew, as a
prompt whose nodes are not cached does.
"""

import gc
import importlib.util
import json
from pathlib import Path

import comfy.model_management as management
import folder_paths
import torch
from inside_apply_lib import FOLDER, ROOT, condition, pack, sample

spec = importlib.util.spec_from_file_location("long_runs", ROOT / "tests" / "faults" / "long_runs.py")
long_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(long_runs)

folder_paths.set_output_directory(str(FOLDER / "output"))
nodes = pack("nodes").NODE_CLASS_MAPPINGS
module = pack("spectral_core.adapter.adapter")
methods = pack("spectral_core.methods")
save = pack("spectral_core.files.adapter_file").save
plan = json.loads((FOLDER / "cycles.json").read_text())
OURS, THEIRS = "unet.down_blocks.1.attentions.0.transformer_blocks.0", "input_blocks.3.1.transformer_blocks.0"


def write(model):
    folder = FOLDER / "output" / "spectral_adapters"
    folder.mkdir(parents=True)
    state = model.model.diffusion_model.state_dict()
    weights = {f"{OURS}.{x}": state[f"{THEIRS}.{x}.weight"].clone() for x in ("attn1.to_q", "attn2.to_k")}
    configs = (methods.LoRAConfig(4), methods.FouRAConfig(4), methods.SpectralAConfig((0, 1, 2, 3)))
    for number, config in enumerate(configs):
        made = module.create(weights, config, generator=torch.Generator().manual_seed(number))
        learned = methods.METHODS[config.method].trainable(config)

        def moved(name, term, learned=learned):
            params = {k: v + 0.1 if k in learned else v for k, v in term.params.items()}
            return module.Term(term.config, params)

        save(made.map_terms(moved), folder / f"{number}.safetensors")


def cycle(number, model, clip, words):
    load = nodes["SpectralAdapters_LoadFouRA"]()
    adapter = load.load(f"{number % 3}.safetensors", 1.0, 1.0)["result"][2]
    mode = ("auto", "live", "merged")[number // 3 % 3] if number % 3 != 1 else "live"
    applied = nodes["SpectralAdapters_ApplyAdapter"]().apply(adapter, 0.8, 0.8, mode, model=model, clip=clip)
    sample(applied["result"][0], words, steps=2)
    del applied, adapter, load
    management.unload_all_models()
    management.cleanup_models()
    management.soft_empty_cache()


with torch.inference_mode():
    model, clip, _ = pack("nodes.host.demo.model").load()
    write(model)
    words = condition()
    base = sample(model, words, steps=2)
    seen, every = [], max(1, plan["cycles"] // plan["measured"])
    for number in range(plan["cycles"]):
        cycle(number, model, clip, words)
        if (number + 1) % every == 0:
            gc.collect()
            seen.append((number + 1, long_runs.measure()))
    assert torch.equal(sample(model, words, steps=2), base), "the base samples differently"
Path(FOLDER, "seen.json").write_text(json.dumps(seen))
