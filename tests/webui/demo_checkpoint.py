"""The embedded demo model as a checkpoint that Automatic1111 reads, with the configuration beside it.

    python tests/webui/demo_checkpoint.py FOLDER

Shapes: the demo model's.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from spectral_core.names.unet_blocks import UNetLayout

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = UNetLayout.from_config(
    json.loads((ROOT / "demo_model/unet/config.json").read_text(encoding="utf-8"))
)
TEMPLATE = """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 16
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32
        in_channels: 4
        out_channels: 4
        model_channels: 64
        attention_resolutions: [2]
        num_res_blocks: 1
        channel_mult: [1, 1, 2]
        num_head_channels: 32
        use_spatial_transformer: true
        transformer_depth: 1
        context_dim: 128
        use_checkpoint: false
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 128
          in_channels: 3
          out_ch: 3
          ch: 64
          ch_mult: [1, 1, 1, 1]
          num_res_blocks: 0
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params:
        version: VERSION
"""


def _demo_weights() -> Any:
    """The pack's module of the demo model's weights, whose package is the folder above ``nodes``."""
    name = ROOT.name.replace("-", "_") + "_pack"
    package = types.ModuleType(name)
    package.__path__ = [str(ROOT)]
    sys.modules[name] = package
    return importlib.import_module(f"{name}.nodes.host.demo.weights")


def write(folder: Path) -> Path:
    """``demo.safetensors``, ``demo.yaml`` and the tokenizer's folder; the checkpoint's path."""
    demo = _demo_weights()
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "demo_text"
    shutil.copytree(ROOT / "demo_model" / "tokenizer", text, dirs_exist_ok=True)
    config = json.loads((ROOT / "demo_model" / "text_encoder" / "config.json").read_text())
    (text / "config.json").write_text(json.dumps(config))
    (folder / "demo.yaml").write_text(TEMPLATE.replace("VERSION", json.dumps(str(text))))
    unet = demo.native_unet(demo.read_weights("unet"), demo.read_config("unet"))
    vae = demo.native_vae(demo.read_weights("vae"), demo.read_config("vae"))
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet.items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae.items()}
    for key, value in demo.native_text(demo.read_weights("text_encoder")).items():
        if key.endswith("token_embedding.weight"):
            value = value[: config["vocab_size"]]
        tensors[f"cond_stage_model.transformer.{key}"] = value
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "demo.safetensors")
    return folder / "demo.safetensors"


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
