"""Small checkpoints of other families than SD 1.x, with random weights, and adapters for them.

Automatic1111 takes any size that a configuration beside the file names: its own files for these families,
narrowed. Forge and Neo tell a family by its widths, so there only the number of channels on the lower levels
and of layers is small.

Shapes: OpenCLIP's fused attention (3 · dim, dim), rows of q, k and v one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import spectral_core as sc
from spectral_core.adapter.adapter import Adapter, Provenance
from spectral_core.files import adapter_file
from tests.webui.checkpoints import VAE, _moved
from tests.webui.demo_checkpoint import _demo_weights

WORD = "<shape>"
SPREAD = 0.03
TOKENS = 49408
CONFIGS = Path("repositories/stable-diffusion-stability-ai/configs/stable-diffusion")
CONFIGS_XL = Path("repositories/generative-models/configs/inference")
_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


@dataclass(frozen=True)
class OpenCLIP:
    """Sizes of a text tower; arch: open_clip's name for it."""

    arch: str
    width: int
    heads: int
    layers: int

    def weights(self, generator: torch.Generator) -> dict[str, Tensor]:
        """With OpenCLIP's own names."""
        wide = self.width

        def drawn(*shape: int, spread: float = SPREAD) -> Tensor:
            return torch.randn(shape, generator=generator) * spread

        found = {
            "positional_embedding": drawn(77, wide),
            "text_projection": drawn(wide, wide),
            "logit_scale": torch.tensor(4.6),
            "token_embedding.weight": drawn(TOKENS, wide),
            "ln_final.weight": torch.ones(wide),
            "ln_final.bias": drawn(wide, spread=0.1),
        }
        for number in range(self.layers):
            block = f"transformer.resblocks.{number}"
            found |= {
                f"{block}.attn.in_proj_weight": drawn(3 * wide, wide),
                f"{block}.attn.in_proj_bias": torch.zeros(3 * wide),
                f"{block}.attn.out_proj.weight": drawn(wide, wide),
                f"{block}.attn.out_proj.bias": torch.zeros(wide),
                f"{block}.mlp.c_fc.weight": drawn(4 * wide, wide),
                f"{block}.mlp.c_fc.bias": torch.zeros(4 * wide),
                f"{block}.mlp.c_proj.weight": drawn(wide, 4 * wide),
                f"{block}.mlp.c_proj.bias": torch.zeros(wide),
            }
            for norm in ("ln_1", "ln_2"):
                found |= {
                    f"{block}.{norm}.weight": torch.ones(wide),
                    f"{block}.{norm}.bias": torch.zeros(wide),
                }
        return found


SMALL = OpenCLIP("ViT-S-32", 384, 6, 12)


def open_clip_layers(weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Some of the layers that adapters sit on, under transformers' names: three of an attention's four (the
    host applies LoRAs of all or none) and the first of the MLP."""
    found = {}
    for number in (0, 5):
        block, ours = f"transformer.resblocks.{number}", f"{part}.text_model.encoder.layers.{number}"
        query, key, _ = weights[f"{block}.attn.in_proj_weight"].chunk(3)
        found |= {
            f"{ours}.self_attn.q_proj": query,
            f"{ours}.self_attn.k_proj": key,
            f"{ours}.self_attn.out_proj": weights[f"{block}.attn.out_proj.weight"],
            f"{ours}.mlp.fc1": weights[f"{block}.mlp.c_fc.weight"],
        }
    return found


def unet(generator_seed: int, **config: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A UNet's weights with native keys, and those of the layers that adapters sit on."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(generator_seed)
    model = UNet2DConditionModel(**config)
    with torch.no_grad():  # a new one ends in a convolution near zero: adapters would hardly be seen
        model.conv_out.weight.mul_(4)
    state = model.state_dict()
    chosen = ("attn2.to_k", "attn2.to_v", "attn1.to_q", "ff.net.2", "resnets.0.conv1", "proj_in")
    layers = {
        f"unet.{key.removesuffix('.weight')}": value
        for key, value in state.items()
        if key.endswith(tuple(f"{name}.weight" for name in chosen))
    }
    return _demo_weights().native_unet(state, dict(model.config)), layers


def save(path: Path, tensors: Mapping[str, Tensor], half: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = torch.float16 if half else torch.float32
    save_file({key: value.to(kind).contiguous() for key, value in tensors.items()}, path)


def adapters(layers: Mapping[str, Tensor], rows: Mapping[str, int], folder: Path, family: str) -> None:
    """``<family>_foura`` with a trained word and ``<family>_lora`` without, on all sides, none of them
    zero. rows: text encoder -> width of a word; none: no word."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"foura": sc.FouRAConfig(rank=4), "lora": sc.LoRAConfig(rank=4)}
    for number, (name, config) in enumerate(made.items()):
        generator = torch.Generator().manual_seed(number)
        adapter = sc.create({k: v.float() for k, v in layers.items()}, config, generator=generator)
        moved = adapter.map_terms(lambda _, term, g=generator: _moved(term, g, 0.1))
        tokens = {}
        if name == "foura" and rows:
            tokens = {WORD: {part: torch.randn(1, n, generator=generator) for part, n in rows.items()}}
        provenance = Provenance(name=f"{family}_{name}", family=family, trigger_words=(WORD,))
        path = folder / f"{family}_{name}.safetensors"
        adapter_file.save(Adapter(moved.layers, provenance, tokens=tokens), path, overwrite=True)


# --- Automatic1111 ------------------------------------------------------------------------------------


def _beside(host: Path, source: Path, path: Path, changes: Mapping[str, Any]) -> None:
    """The host's own configuration for a family, with the changes (dotted places), beside the checkpoint."""
    config = yaml.safe_load((host / source).read_text(encoding="utf-8"))
    for place, value in changes.items():
        where: Any = config["model"]["params"]
        *inner, last = place.split(".")
        for name in inner:
            where = where[int(name) if isinstance(where, list) else name]
        where[last] = value
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def _autoencoder() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The demo model's: its weights under ``first_stage_model``, and the changes to a configuration."""
    demo = _demo_weights()
    config = demo.read_config("vae")
    weights = demo.native_vae(demo.read_weights("vae"), config)
    changes = {
        f"first_stage_config.params.ddconfig.{name}": value
        for name, value in demo.vae_config(config)["ddconfig"].items()
    }
    changes["first_stage_config.params.ddconfig.attn_type"] = "vanilla"
    return {f"first_stage_model.{key}": value for key, value in weights.items()}, changes


def _unet_changes(place: str, config: Mapping[str, Any]) -> dict[str, Any]:
    channels = config["block_out_channels"]
    depths = config.get("transformer_layers_per_block", 1)
    own = {
        "model_channels": channels[0],
        "channel_mult": [c // channels[0] for c in channels],
        "num_res_blocks": config["layers_per_block"],
        "num_head_channels": 32,
        "context_dim": config["cross_attention_dim"],
        "transformer_depth": depths if isinstance(depths, int) else list(depths),
        "use_checkpoint": False,
    }
    return {f"{place}.params.{name}": value for name, value in own.items()}


def write_sd2(host: Path, models: Path, folder: Path) -> str:
    """For Automatic1111: SD 2's blocks, OpenCLIP's text encoder, predicting v."""
    config = {
        "block_out_channels": (64, 64, 128, 128),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "attention_head_dim": (2, 2, 4, 4),
        "cross_attention_dim": SMALL.width,
        "use_linear_projection": True,
    }
    native, layers = unet(1, **config)
    text = SMALL.weights(torch.Generator().manual_seed(2))
    vae, changes = _autoencoder()
    tensors = {f"model.diffusion_model.{k}": v for k, v in native.items()} | vae
    tensors |= {f"cond_stage_model.model.{k}": v for k, v in text.items()}
    changes |= _unet_changes("unet_config", config)
    changes |= {
        "unet_config.params.use_fp16": False,
        "cond_stage_config.params.arch": SMALL.arch,
    }
    save(models / "sd2.safetensors", tensors)
    _beside(host, CONFIGS / "v2-inference-v.yaml", models / "sd2.safetensors", changes)
    adapters(layers | open_clip_layers(text, "text_encoder"), {"text_encoder": SMALL.width}, folder, "sd2")
    return "sd2"


def write_sdxl(host: Path, models: Path, folder: Path) -> str:
    """For Automatic1111: SDXL's blocks, two deep on the last level; the demo model's text encoder first,
    OpenCLIP's second; the sizes of pictures as a vector."""
    demo = _demo_weights()
    first = demo.read_config("text_encoder")
    width = first["hidden_size"]
    config = {
        "block_out_channels": (64, 128, 128),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "layers_per_block": 2,
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": width + SMALL.width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": SMALL.width + 6 * 256,
    }
    native, layers = unet(3, **config)
    text = SMALL.weights(torch.Generator().manual_seed(4))
    vae, changes = _autoencoder()
    tensors = {f"model.diffusion_model.{k}": v for k, v in native.items()} | vae
    for key, value in demo.native_text(demo.read_weights("text_encoder")).items():
        if key.endswith("token_embedding.weight"):
            value = value[: first["vocab_size"]]
        if key.endswith("mlp.fc1.weight"):
            layers[f"text_encoder.{key.removesuffix('.weight')}"] = value
        tensors[f"conditioner.embedders.0.transformer.{key}"] = value
    tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in text.items()}
    models.mkdir(parents=True, exist_ok=True)
    tokenizer = models / "demo_text"  # as demo_checkpoint.write leaves it there
    changes |= _unet_changes("network_config", config)
    changes |= {
        "network_config.params.adm_in_channels": config["projection_class_embeddings_input_dim"],
        "conditioner_config.params.emb_models.0.params.version": str(tokenizer),
        "conditioner_config.params.emb_models.0.params.layer_idx": first["num_hidden_layers"] - 1,
        "conditioner_config.params.emb_models.1.params.arch": SMALL.arch,
    }
    save(models / "sdxl.safetensors", tensors)
    _beside(host, CONFIGS_XL / "sd_xl_base.yaml", models / "sdxl.safetensors", changes)
    rows = {"text_encoder": width, "text_encoder_2": SMALL.width}
    adapters(layers | open_clip_layers(text, "text_encoder_2"), rows, folder, "sdxl")
    return "sdxl"


# --- Forge and Neo ------------------------------------------------------------------------------------

LARGE = OpenCLIP("ViT-H-14", 1024, 16, 24)  # of SD 2
LARGEST = OpenCLIP("ViT-bigG-14", 1280, 20, 32)  # SDXL's second
CLIP_WIDTH = 768
FLUX_WIDTH, FLUX_HEAD, T5_WIDTH = 256, 128, 4096
NARROWED = """import functools

import backend.loader
import huggingface_guess.detection as detection
from huggingface_guess import model_list

kept_detect, kept_read = detection.detect_unet_config, backend.loader.read_arbitrary_config


def detect(state_dict, prefix, *args, **given):
    # Forge knows one size of Flux, Neo one of Z-Image; these are told by their weights.
    found = kept_detect(state_dict, prefix, *args, **given)
    kind = found.get("image_model") if found else None
    if kind == "flux":
        width = state_dict[f"{prefix}img_in.weight"].shape[0]
        found |= {"hidden_size": width, "num_heads": width // 128, "depth": 1, "depth_single_blocks": 1}
    if kind == "lumina2":
        heads = found["dim"] // 128
        found |= {"n_heads": heads, "n_kv_heads": heads, "axes_dims": [32, 48, 48], "rope_theta": 256.0}
        found |= {"axes_lens": [1536, 512, 512], "z_image_modulation": True, "time_scale": 1000.0}
        found |= {"ffn_dim_multiplier": 8 / 3, "pad_tokens_multiple": 32}
        found |= {"nunchaku": False}
    return found


def read(folder):
    found = kept_read(folder)
    if "d_kv" in found:  # T5
        found |= {"num_layers": 2, "d_ff": 128}
    if found.get("model_type") == "qwen3":
        found = {"hidden_size": found["hidden_size"]}
    return found


detection.detect_unet_config, backend.loader.read_arbitrary_config = detect, read
if hasattr(model_list, "ZImage"):
    import backend.nn.llm.llama as llama

    model_list.ZImage.unet_config["dim"] = 256
    sizes = {"intermediate_size": 256, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    llama.Qwen3_4BConfig = functools.partial(llama.Qwen3_4BConfig, **sizes)
"""
"""A script of another extension: the host builds the narrow models below, and short text encoders."""


def _vae(seed: int, **changes: Any) -> dict[str, Tensor]:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(**(VAE | changes))
    return _demo_weights().native_vae(model.state_dict(), dict(model.config))


def _clip(seed: int) -> dict[str, Tensor]:
    """SD 1's text encoder, ``text_model.…``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    sizes = CLIPTextConfig(hidden_size=CLIP_WIDTH, intermediate_size=3072, num_attention_heads=12)
    found = {}
    for key, value in CLIPTextModel(sizes).state_dict().items():
        if not key.endswith("position_ids"):
            found[key if key.startswith("text_model.") else f"text_model.{key}"] = value
    # The host divides by the mean of what the encoder gives, which a new one's norm makes zero.
    torch.nn.init.normal_(found["text_model.final_layer_norm.bias"], 0.1, 0.1)
    return found


def _clip_layers(clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    chosen = tuple(f"layers.{n}.{leaf}.weight" for n in (0, 5) for leaf in ("mlp.fc1", "self_attn.q_proj"))
    return {
        f"text_encoder.{key.removesuffix('.weight')}": value
        for key, value in clip.items()
        if key.endswith(chosen)
    }


def write_sd2_wide(models: Path, folder: Path) -> str:
    """For Forge: as narrow as SD 2 may be there, 1.2 GB."""
    config = {
        "block_out_channels": (320,) * 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "attention_head_dim": 5,
        "cross_attention_dim": LARGE.width,
        "use_linear_projection": True,
    }
    native, layers = unet(1, **config)
    text = LARGE.weights(torch.Generator().manual_seed(2))
    tensors = {f"model.diffusion_model.{k}": v for k, v in native.items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in _vae(2).items()}
    tensors |= {f"cond_stage_model.model.{k}": v for k, v in text.items()}
    save(models / "sd2.safetensors", tensors, half=True)
    adapters(layers | open_clip_layers(text, "text_encoder"), {"text_encoder": LARGE.width}, folder, "sd2")
    return "sd2"


def write_sdxl_wide(models: Path, folder: Path) -> str:
    """For Forge and Neo: as narrow as SDXL may be there, 2.3 GB."""
    config = {
        "block_out_channels": (320,) * 3,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "layers_per_block": 2,
        "attention_head_dim": 5,
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": CLIP_WIDTH + LARGEST.width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": LARGEST.width + 6 * 256,
    }
    native, layers = unet(3, **config)
    clip, text = _clip(3), LARGEST.weights(torch.Generator().manual_seed(4))
    tensors = {f"model.diffusion_model.{k}": v for k, v in native.items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in _vae(4).items()}
    tensors |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in clip.items()}
    tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in text.items()}
    save(models / "sdxl.safetensors", tensors, half=True)
    rows = {"text_encoder": CLIP_WIDTH, "text_encoder_2": LARGEST.width}
    adapters(layers | _clip_layers(clip) | open_clip_layers(text, "text_encoder_2"), rows, folder, "sdxl")
    return "sdxl"


def write_flux(models: Path, folder: Path) -> str:
    """For Forge and Neo with :data:`NARROWED`: one double and one single block of two heads, CLIP whole, a T5
    of two layers."""
    generator = torch.Generator().manual_seed(5)
    wide = FLUX_WIDTH
    native: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        native[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
        if bias:
            native[f"{name}.bias"] = torch.zeros(rows)

    for name, columns in (("time_in", 256), ("vector_in", CLIP_WIDTH), ("guidance_in", 256)):
        linear(f"{name}.in_layer", wide, columns)
        linear(f"{name}.out_layer", wide, wide)
    linear("img_in", wide, 64)
    linear("txt_in", wide, T5_WIDTH)
    for side in ("img", "txt"):
        linear(f"double_blocks.0.{side}_mod.lin", 6 * wide, wide)
        linear(f"double_blocks.0.{side}_attn.qkv", 3 * wide, wide)
        linear(f"double_blocks.0.{side}_attn.proj", wide, wide)
        linear(f"double_blocks.0.{side}_mlp.0", 4 * wide, wide)
        linear(f"double_blocks.0.{side}_mlp.2", wide, 4 * wide)
    linear("single_blocks.0.linear1", 7 * wide, wide)
    linear("single_blocks.0.linear2", wide, 5 * wide)
    linear("single_blocks.0.modulation.lin", 3 * wide, wide)
    linear("final_layer.linear", 64, wide)
    linear("final_layer.adaLN_modulation.1", 2 * wide, wide)
    for norm in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        for part in ("query", "key"):
            native[f"{norm}.norm.{part}_norm.scale"] = torch.ones(FLUX_HEAD)
    clip = _clip(6)
    t5 = {"shared.weight": torch.randn(32128, T5_WIDTH, generator=generator)}
    for number in range(2):
        block = f"encoder.block.{number}.layer"
        for leaf, shape in {
            **{f"0.SelfAttention.{part}": (T5_WIDTH, T5_WIDTH) for part in "qkvo"},
            "1.DenseReluDense.wi_0": (128, T5_WIDTH),
            "1.DenseReluDense.wi_1": (128, T5_WIDTH),
            "1.DenseReluDense.wo": (T5_WIDTH, 128),
        }.items():
            t5[f"{block}.{leaf}.weight"] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for norm in ("0.layer_norm", "1.layer_norm"):
            t5[f"{block}.{norm}.weight"] = torch.ones(T5_WIDTH)
    t5["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = torch.zeros(32, 64)
    t5["encoder.final_layer_norm.weight"] = torch.ones(T5_WIDTH)
    vae = _vae(6, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    tensors = {f"model.diffusion_model.{k}": v for k, v in native.items()}
    tensors |= {f"vae.{k}": v for k, v in vae.items()}
    tensors |= {f"text_encoders.clip_l.transformer.{k}": v for k, v in clip.items()}
    tensors |= {f"text_encoders.t5xxl.transformer.{k}": v for k, v in t5.items()}
    save(models / "flux.safetensors", tensors, half=True)
    double, single = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"
    query, key, _ = native["double_blocks.0.img_attn.qkv.weight"].chunk(3)
    layers = {
        f"{double}.attn.to_q": query,
        f"{double}.attn.to_k": key,
        f"{double}.ff.net.0.proj": native["double_blocks.0.img_mlp.0.weight"],
        f"{double}.ff_context.net.2": native["double_blocks.0.txt_mlp.2.weight"],
        f"{single}.attn.to_v": native["single_blocks.0.linear1.weight"][2 * wide : 3 * wide],
        f"{single}.proj_mlp": native["single_blocks.0.linear1.weight"][3 * wide :],
        f"{single}.proj_out": native["single_blocks.0.linear2.weight"],
    }
    adapters(layers | _clip_layers(clip), {"text_encoder": CLIP_WIDTH}, folder, "flux")
    return "flux"


QWEN_WIDTH, QWEN_ROWS = 2560, 151936


def write_z_image(models: Path, folder: Path) -> str:
    """For Neo with :data:`NARROWED`: one layer and the refiners, two heads wide, three layers of Qwen3."""
    generator = torch.Generator().manual_seed(7)
    wide, inner = FLUX_WIDTH, 768
    native: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = False) -> None:
        native[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
        if bias:
            native[f"{name}.bias"] = torch.zeros(rows)

    linear("x_embedder", wide, 64, True)
    linear("cap_embedder.1", wide, QWEN_WIDTH, True)
    linear("t_embedder.mlp.0", wide, 256, True)
    linear("t_embedder.mlp.2", 256, wide, True)
    linear("final_layer.linear", 64, wide, True)
    linear("final_layer.adaLN_modulation.1", wide, 256, True)
    native["cap_embedder.0.weight"] = torch.ones(QWEN_WIDTH)
    for name in ("x_pad_token", "cap_pad_token"):
        native[name] = torch.zeros(1, wide)
    refiners = [f"{kind}_refiner.{number}" for kind in ("noise", "context") for number in range(2)]
    for block in ("layers.0", *refiners):
        linear(f"{block}.attention.qkv", 3 * wide, wide)
        linear(f"{block}.attention.out", wide, wide)
        for name, shape in {"w1": (inner, wide), "w2": (wide, inner), "w3": (inner, wide)}.items():
            linear(f"{block}.feed_forward.{name}", *shape)
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            native[f"{block}.{norm}.weight"] = torch.ones(wide)
        for norm in ("q_norm", "k_norm"):
            native[f"{block}.attention.{norm}.weight"] = torch.ones(FLUX_HEAD)
        if not block.startswith("context"):
            linear(f"{block}.adaLN_modulation.0", 4 * wide, 256, True)
    qwen = {"model.embed_tokens.weight": torch.randn(QWEN_ROWS, QWEN_WIDTH, generator=generator)}
    qwen["model.norm.weight"] = torch.ones(QWEN_WIDTH)
    for number in range(3):
        block = f"model.layers.{number}"
        for leaf, (rows, columns) in {
            "self_attn.q_proj": (2 * FLUX_HEAD, QWEN_WIDTH),
            "self_attn.k_proj": (FLUX_HEAD, QWEN_WIDTH),
            "self_attn.v_proj": (FLUX_HEAD, QWEN_WIDTH),
            "self_attn.o_proj": (QWEN_WIDTH, 2 * FLUX_HEAD),
            "mlp.gate_proj": (256, QWEN_WIDTH),
            "mlp.up_proj": (256, QWEN_WIDTH),
            "mlp.down_proj": (QWEN_WIDTH, 256),
        }.items():
            qwen[f"{block}.{leaf}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
        for norm in ("input_layernorm", "post_attention_layernorm"):
            qwen[f"{block}.{norm}.weight"] = torch.ones(QWEN_WIDTH)
        for norm in ("q_norm", "k_norm"):
            qwen[f"{block}.self_attn.{norm}.weight"] = torch.ones(FLUX_HEAD)
    vae = _vae(6, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    tensors = {f"model.diffusion_model.{k}": v for k, v in native.items()}
    tensors |= {f"vae.{k}": v for k, v in vae.items()}
    tensors |= {f"text_encoders.qwen3_4b.transformer.{k}": v for k, v in qwen.items()}
    save(models / "z_image.safetensors", tensors, half=True)
    query, key, _ = native["layers.0.attention.qkv.weight"].chunk(3)
    layers = {
        "transformer.layers.0.attention.to_q": query,
        "transformer.layers.0.attention.to_k": key,
        "diffusion_model.layers.0.attention.out": native["layers.0.attention.out.weight"],
        "diffusion_model.layers.0.feed_forward.w2": native["layers.0.feed_forward.w2.weight"],
        "diffusion_model.noise_refiner.1.attention.qkv": native["noise_refiner.1.attention.qkv.weight"],
    }
    adapters(layers, {}, folder, "z_image")
    return "z_image"
