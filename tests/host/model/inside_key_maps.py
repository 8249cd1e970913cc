"""Inside a host: its own map from LoRA keys to weights, for models built on the meta device.

Reads ``question.json``: per case the names and shapes of a UNet's weights, ``diffusers`` (from which the host
tells the model itself) or ``native``, and the host's text encoder class. Writes ``answer.json``: per case the
model's class, the maps and the shape of every weight.
"""

import importlib
import json
import sys
from pathlib import Path

import comfy.lora
import comfy.model_detection as detection
import torch

folder = Path(sys.argv[2])


def stubs(shapes):
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def unet_of(case):
    if case["spelling"] == "diffusers":
        config = detection.model_config_from_diffusers_unet(stubs(case["unet"]))
    else:
        config = detection.model_config_from_unet(stubs(case["unet"]), "", use_base_if_no_match=True)
    return type(config).__name__, config.get_model({}, "", device="meta")


def shapes_of(model):
    return {key: list(weight.shape) for key, weight in model.state_dict().items() if key.endswith(".weight")}


def answer(case):
    kind, unet = unet_of(case)
    module, name = case["clip"].rsplit(".", 1)
    clip = getattr(importlib.import_module(module), name)(device="meta")
    return {
        "kind": kind,
        "unet": comfy.lora.model_lora_keys_unet(unet, {}),
        "clip": comfy.lora.model_lora_keys_clip(clip, {}),
        "shapes": shapes_of(unet) | shapes_of(clip),
    }


with torch.inference_mode():
    question = json.loads((folder / "question.json").read_text(encoding="utf-8"))
    answers = {name: answer(case) for name, case in question.items()}
    (folder / "answer.json").write_text(json.dumps(answers), encoding="utf-8")
