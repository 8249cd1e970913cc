"""The embedded demo model: from its diffusers folder to weights and configurations of the host's classes.

Nothing here needs the host. The native names of UNet and text encoder follow from
``spectral_core.names.spellings``, of the autoencoder from its level numbers: the host's own converter only
knows four levels.

Shapes: every tensor keeps its own, except the autoencoder's attention, linear (o, i) -> 1 x 1 convolution
(o, i, 1, 1), and the token table, (n, 128) -> (49408, 128), filled up with zeros.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ....spectral_core.errors import SpectralAdapterError
from ....spectral_core.names import spellings as keys
from ....spectral_core.names.spellings import ModelLayout
from ....spectral_core.names.unet_blocks import UNetLayout

FOLDER = Path(__file__).resolve().parents[3] / "demo_model"
HOST_VOCABULARY = 49408  # rows of the token table in the host's CLIP classes, whatever the configuration says
CONFIG_FILE = "config.json"
SCHEDULE_FILE = "scheduler/scheduler_config.json"
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def read_config(part: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The configuration of ``unet``, ``vae`` or ``text_encoder``."""
    return _read_json(folder / part / CONFIG_FILE)


def sampling_settings(folder: Path = FOLDER) -> dict[str, float]:
    """The ends of the noise schedule, as the host's model configurations name them."""
    config = _read_json(folder / SCHEDULE_FILE)
    return {"linear_start": config["beta_start"], "linear_end": config["beta_end"]}


def read_weights(part: str, folder: Path = FOLDER) -> dict[str, Tensor]:
    """The stored half-precision weights of a part in float32, with diffusers' names."""
    path = folder / WEIGHTS[part]
    if not path.is_file():
        raise _incomplete(path)
    return {key: tensor.to(torch.float32) for key, tensor in load_file(path).items()}


def special_tokens(folder: Path = FOLDER) -> dict[str, int]:
    """Token ids of the start, the end and the padding, as the host's text encoder class names them."""
    config = read_config("text_encoder", folder)
    return {
        "start": config["bos_token_id"],
        "end": config["eos_token_id"],
        "pad": config["pad_token_id"],
    }


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _incomplete(path)
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _incomplete(path: Path) -> SpectralAdapterError:
    return SpectralAdapterError(
        f"{path.name}: expected it in the demo model's folder {path.parent}, found no such file; "
        "the pack was not copied completely: install it again"
    )


# The configurations, as the host's classes want them.


def unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """For the host's UNetModel. Only for one width per attention head and equal counts of residual blocks,
    which the demo model has.
    """
    layout = UNetLayout.from_config(config)
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    # diffusers' attention_head_dim is the number of heads
    (head,) = {c // n for c, n in zip(channels, config["attention_head_dim"], strict=True)}
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [c // channels[0] for c in channels],
        "num_res_blocks": [layers] * len(channels),
        "transformer_depth": [depth for level in layout.down for depth in level],
        "transformer_depth_middle": layout.mid,
        "transformer_depth_output": [depth for level in reversed(layout.up) for depth in reversed(level)],
        "context_dim": config["cross_attention_dim"],
        "num_head_channels": head,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(config["use_linear_projection"]),
        "legacy": False,
    }


def vae_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the host's AutoencoderKL."""
    channels = config["block_out_channels"]
    ddconfig = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": channels[0],
        "ch_mult": [c // channels[0] for c in channels],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"ddconfig": ddconfig, "embed_dim": config["latent_channels"]}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The CLIP configuration, only with what the host's class reads."""
    names = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "hidden_act"]
    names += ["max_position_embeddings", "eos_token_id"]
    return {name: config[name] for name in names}


# The weights, with native keys.


def native_unet(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keys inside ``diffusion_model.``."""
    layout, native = ModelLayout.sd1(UNetLayout.from_config(config)), {}
    for key, tensor in weights.items():
        path, _, kind = key.rpartition(".")
        weight = keys.to_native(f"unet.{path}", layout)[0].removeprefix("diffusion_model.")
        native[weight.removesuffix("weight") + kind] = tensor
    return native


def native_text(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys inside ``clip_l.transformer.``; the token table filled up with zeros."""
    layout, native = ModelLayout.sd1(), {}
    for key, tensor in weights.items():
        path, _, kind = key.rpartition(".")
        weight = keys.to_native(f"text_encoder.{path}", layout)[0].removeprefix("clip_l.transformer.")
        native[weight.removesuffix("weight") + kind] = tensor
    table = "text_model.embeddings.token_embedding.weight"
    native[table] = nn.functional.pad(native[table], (0, 0, 0, HOST_VOCABULARY - len(native[table])))
    return native


def native_vae(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The original code's names: levels finest first on both sides, attention as 1 x 1 convolutions."""
    last = len(config["block_out_channels"]) - 1
    native = {}
    for key, tensor in weights.items():
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = re.sub(r"down_blocks\.(\d+)", r"down.\1", key)
        key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", key)
        key = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", key)
        key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        if "mid_block.attentions.0." in key:
            key = key.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
            key = key.replace("to_out.0", "proj_out").replace("to_", "")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        native[key] = tensor
    return native
