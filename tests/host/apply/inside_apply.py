"""Inside a host: adapters from files on the demo model, merged and live; what the denoiser then answers.

Reads ``cases.json`` (adapter files by case, and which of them weights can hold) and ``inputs.safetensors``;
writes ``outputs.safetensors`` (inputs and outputs of the denoiser itself, hidden states of the text encoder)
and ``report.json``.
"""

import json

import torch
from inside_apply_lib import FOLDER, adapter, pack, predict
from safetensors.torch import load_file, save_file

applying = pack("nodes.host.apply.adapters")
demo = pack("nodes.host.demo.model")
cases = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
given = load_file(FOLDER / "inputs.safetensors")
outputs, report = {}, {}

with torch.inference_mode():
    model, clip = demo.load_model(), demo.load_clip()
    sigma = given["sigma"]

    def denoised(name, patcher, sigma=sigma):
        result = predict(patcher, given["x"], sigma, given["context"])
        for kind, tensor in zip(("input", "timesteps", "output"), result, strict=True):
            outputs[f"{name}.{kind}"] = tensor

    def apply(name, mode, clip=None, on=model):
        applied = applying.apply(adapter(name), on, clip, cases["strength"], cases["strength"], mode)
        report[f"{name}.{mode}"] = [applied.mode, applied.report]
        return applied

    denoised("base", model)
    for name, mergeable in cases["unet"].items():
        for mode in ("live", "merged") if mergeable else ("live",):
            denoised(f"{name}.{mode}", apply(name, mode).model)
    live = model
    for name in cases["together"]:
        live = apply(name, "live", on=live).model
    denoised("together", live)
    live = model
    for name in reversed(cases["together"]):
        live = apply(name, "live", on=live).model
    denoised("together reversed", live)
    scheduled = apply("scheduled", "auto").model
    sampling = model.model.model_sampling
    for percent in cases["percents"]:
        level = torch.full((2,), sampling.percent_to_sigma(percent))
        denoised(f"scheduled.{percent}", scheduled, level)
    denoised("after", model)

    def encode(name, clip):
        tokens = clip.tokenize(cases["prompt"])
        outputs[f"{name}.states"], outputs[f"{name}.pooled"] = clip.encode_from_tokens(
            tokens, return_pooled=True
        )

    encode("text base", clip)
    for name, mergeable in cases["text"].items():
        for mode in ("live", "merged") if mergeable else ("live",):
            encode(f"{name}.{mode}", apply(name, mode, clip).clip)
    encode("text after", clip)
    save_file({k: v.contiguous() for k, v in outputs.items()}, FOLDER / "outputs.safetensors")
    (FOLDER / "report.json").write_text(json.dumps(report), encoding="utf-8")
