"""Inside a host: models with its quantised weights (comfy_quant): applied, trained on, the same after it."""

import json
import shutil
import sys
import traceback

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as models
import torch
from inside_apply_lib import FOLDER, leftovers, pack
from inside_apply_models import ADAPTIVE, LORA, new
from inside_models import CPU, FAMILIES
from inside_train_lib import RUNS, SAVED, train

try:
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
except ImportError:
    QUANT_ALGOS = {}

applying = pack("nodes.host.apply.adapters")
adapter_file = pack("spectral_core.files.adapter_file")
compat = pack("nodes.host.model.compat")
events = pack("spectral_core.training.runs.events")
layers = pack("nodes.host.training.layers")
places = pack("nodes.host.model.places")

CASES = [
    (family, form)
    for family in ("wan2.1", "qwen-image", "flux", "z-image", "ltxv")
    for form in ("float8_e4m3fn", "int8_tensorwise")
]


def quantised(family, form):
    """The family's model in bf16, its blocks' linear weights quantised as a file of that format has them;
    without a format none is."""
    source = family.patcher()
    kind = getattr(models, family.kind)
    settings = kind({**source.model.model_config.unet_config, "dtype": torch.bfloat16})
    settings.quant_config = {"mixed_ops": True}
    settings.set_inference_dtype(torch.bfloat16, None)
    model = settings.get_model({}, device=CPU)
    layout = form and QUANT_ALGOS[form]["comfy_tensor_layout"]
    scale = {} if form == "int8_tensorwise" else {"scale": "recalculate"}
    state = {}
    for key, value in source.model.diffusion_model.state_dict().items():
        value = value.bfloat16() if value.is_floating_point() else value
        module = places.module_at(model.diffusion_model, key.removesuffix(".weight"))
        in_block = any(step.isdigit() for step in key.split("."))
        fits = value.dim() == 2 and not value.shape[0] % 32 and not value.shape[1] % 32
        if not (form and fits and in_block and hasattr(module, "in_features") and "mod" not in key):
            state[key] = value
            continue
        state |= QuantizedTensor.from_float(value, layout, **scale).state_dict(key)
        said = json.dumps({"format": form}).encode()
        state[key.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    missing = model.diffusion_model.load_state_dict(state, strict=False).missing_keys
    assert not missing, missing[:3]
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def losses(name):
    found = events.read_events(RUNS / name / "events.jsonl")
    return [event["loss"] for event in found if event["event"] == "step"]


def check(name, form):
    family = FAMILIES[name]
    patcher = quantised(family, form)
    base = family.sampled(patcher)
    assert torch.isfinite(base).all()
    chosen = layers.chosen(patcher, "attention+mlp")[0]
    is_on = {k: compat.is_rounded(patcher, f"{k}.weight") for k in chosen}
    weights = {k: w for k, w in layers.BaseWeights(patcher, chosen).items() if is_on[k]}
    assert weights

    def same():
        assert torch.equal(family.sampled(patcher), base), "another base picture"
        assert leftovers(patcher.model) == []

    ours = new(weights, LORA, size=0.2)
    auto = applying.apply(ours, patcher, None, 1.0, 1.0)
    assert auto.mode == "live" and "quantised" in auto.report, auto.report
    live = family.sampled(auto.model)
    merged = applying.apply(ours, patcher, None, 1.0, 1.0, "merged")
    assert "times the update itself" in merged.report, merged.report
    found = family.sampled(merged.model)
    assert not torch.equal(found, base) and not torch.equal(live, base)
    same()
    one = {k: w for k, w in weights.items() if k.endswith((".ffn.2", ".net.2", ".w2"))}
    if one:  # these are read and not called by newer hosts
        acts = family.sampled(applying.apply(new(one, LORA, size=1.0), patcher, None, 1.0, 1.0).model)
        assert not torch.equal(acts, base), f"{list(one)[:2]} do nothing"
    gated = applying.apply(new(weights, ADAPTIVE, size=0.2), patcher, None, 1.0, 1.0)
    assert gated.mode == "live" and not torch.equal(family.sampled(gated.model), base)
    same()
    for method in ("lora", "foura", "spectral_a"):
        trained(family, patcher, method, base)
        same()
    print(f"  {name} {form}: {len(weights)} quantised layers; {merged.report.splitlines()[1][:200]}")


def trained(family, patcher, method, base):
    for folder in (SAVED, RUNS):
        shutil.rmtree(folder, ignore_errors=True)
    given = {"latents": {"samples": family.noise(2, 5)}, "conditioning": [family.words(7)], "method": method}
    given |= {"targets": "attention+mlp", "steps": 10, "batch_size": 1}
    adapter = train(patcher, run_name="learns", **given)[0]
    train(patcher, run_name="does not", **{**given, "learning_rate": 1e-9})
    learned, still = sum(losses("learns")[-5:]), sum(losses("does not")[-5:])
    assert learned < still, f"{method}: {still} to {learned}"
    again = adapter_file.load(SAVED / "learns.safetensors")
    one, two = (family.sampled(applying.apply(a, patcher, None, 1.0, 1.0).model) for a in (adapter, again))
    assert torch.equal(one, two) and not torch.equal(one, base), "the file acts differently"


def never_called():
    """A layer whose weight is read past its forward is an error that names it."""
    family = FAMILIES["wan2.1"]
    patcher = family.patcher()
    chosen = layers.BaseWeights(patcher, layers.chosen(patcher, "*ffn.2")[0])
    model = applying.apply(new(dict(chosen), LORA), patcher, None, 1.0, 1.0, "live").model
    kind = type(patcher.model.diffusion_model.blocks[0].ffn)
    own = kind.forward

    def past(self, x):
        return torch.nn.functional.linear(self[1](self[0](x)), self[2].weight, self[2].bias)

    kind.forward = past
    try:
        family.sampled(model)
    except pack("spectral_core.errors").SpectralAdapterError as error:
        assert "ffn.2" in str(error) and "merged" in str(error), error
    else:
        raise AssertionError("not noticed")
    finally:
        kind.forward = own
    assert leftovers(patcher.model) == []
    family.sampled(model)


def main():
    report = {}
    cases = {f"{name} {form}": (name, form) for name, form in CASES if form in QUANT_ALGOS}
    todo = {case: lambda given=given: check(*given) for case, given in cases.items()}
    if hasattr(comfy.ops, "linear_input_act"):
        todo["never called"] = never_called
    for case, run in todo.items():
        if sys.argv[3:] and not any(word in case for word in sys.argv[3:]):
            continue
        try:
            with torch.inference_mode():
                run()
            report[case] = ""
        except Exception as error:
            report[case] = traceback.format_exc()
            print(f"  {case}: FAILED {type(error).__name__}: {str(error)[:300]}")
        comfy.model_management.unload_all_models()
    (FOLDER / "quantised.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
