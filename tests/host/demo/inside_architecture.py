"""Inside a host: its own UNet, autoencoder, text encoder and tokenizer with the demo model's weights.

Reads ``config.json``, the weights ``unet``, ``vae`` and ``text`` (native keys) and ``inputs`` (safetensors);
writes ``outputs.safetensors``, and ``report.json``: tokens, the keys that each model lacks or has no use for,
and the UNet configuration that the host reads off the weights.
"""

import json
import sys
from pathlib import Path

import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[2])
report = {}


def weights_of(name):
    return load_file(folder / f"{name}.safetensors")


def compare_keys(name, model, weights):
    own = set(model.state_dict())
    report[name] = {"lacking": sorted(own - set(weights)), "unused": sorted(set(weights) - own)}


def unet(config, inputs):
    weights = weights_of("unet")
    model = UNetModel(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.manual_cast).eval()
    compare_keys("unet", model, weights)
    model.load_state_dict(weights)
    found = comfy.model_detection.detect_unet_config(weights, "")
    report["unet"]["detected"] = {key: found[key] for key in config if key in found}
    return {"unet": model(inputs["latents"], inputs["timesteps"], context=inputs["context"])}


def vae(config, inputs):
    weights = weights_of("vae")
    model = comfy.sd.VAE(
        sd=weights, config={"params": config}, device=torch.device("cpu"), dtype=torch.float32
    )
    compare_keys("vae", model.first_stage_model, weights)
    # The host's pictures are (N, height, width, 3) in [0, 1].
    picture = inputs["picture"].movedim(1, -1)
    return {"encoded": model.encode(picture), "decoded": model.decode(inputs["encoded"]).movedim(-1, 1)}


def text(config, special, prompts, tokenizer_folder):
    weights = weights_of("text")
    model = comfy.sd1_clip.SDClipModel(
        dtype=torch.float32,
        textmodel_json_config=config,
        special_tokens=special,
        return_projected_pooled=False,
    )
    compare_keys("text", model.transformer, weights)
    model.load_sd(weights)
    tokenizer = comfy.sd1_clip.SDTokenizer(tokenizer_folder, embedding_size=config["hidden_size"])
    outputs = {}
    report["tokens"] = []
    for i, prompt in enumerate(prompts):
        tokens = tokenizer.tokenize_with_weights(prompt)
        report["tokens"].append([[token for token, _ in row] for row in tokens])
        outputs[f"states_{i}"], outputs[f"pooled_{i}"] = model.encode_token_weights(tokens)
    return outputs


with torch.inference_mode():
    configs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    given = weights_of("inputs")
    outputs = unet(configs["unet"], given) | vae(configs["vae"], given) | text(**configs["text"])
    save_file(
        {key: value.contiguous().clone() for key, value in outputs.items()}, folder / "outputs.safetensors"
    )
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
