"""Small checkpoints that the webuis read, and adapters for them.

Automatic1111 takes the embedded demo model with a configuration beside it
(:mod:`tests.webui.demo_checkpoint`). Forge and Neo tell models by their sizes: for them a narrow SD 1.5 with
random weights, its UNet 320 channels wide on every level, CLIP and autoencoder whole, 640 MB.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import spectral_core as sc
from spectral_core.adapter.adapter import Adapter, Provenance
from spectral_core.files import adapter_file
from spectral_core.methods import method_of
from spectral_core.names.unet_blocks import UNetLayout, unet_table
from tests.webui.demo_checkpoint import _demo_weights

UNET = {
    "block_out_channels": (320, 320, 320, 320),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
WORD = "<narrow>"


def write_narrow(path: Path, seed: int = 0) -> Path:
    """The narrow SD 1.5 as one file in half precision; the same for the same seed."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    demo = _demo_weights()
    torch.manual_seed(seed)
    unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    # The host divides by the mean of what the encoder gives, which a new one's norm makes zero.
    last = next(m for name, m in text.named_modules() if name.endswith("final_layer_norm"))
    torch.nn.init.normal_(last.bias, 0.1, 0.1)  # type: ignore[arg-type]
    tensors: dict[str, Tensor] = {}
    native = demo.native_unet(unet.state_dict(), dict(unet.config))
    tensors |= {f"model.diffusion_model.{key}": value for key, value in native.items()}
    autoencoder = demo.native_vae(vae.state_dict(), dict(vae.config))
    tensors |= {f"first_stage_model.{key}": value for key, value in autoencoder.items()}
    for key, value in text.state_dict().items():
        canonical = key if key.startswith("text_model.") else f"text_model.{key}"
        if not key.endswith("position_ids"):
            tensors[f"cond_stage_model.transformer.{canonical}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in tensors.items()}, path)
    return path


def rotated(checkpoint: Path, layout: UNetLayout, file: Path) -> None:
    """A rotational Spectral Adapter, whose words nobody trained, so that it does not go with its name."""
    made = sc.create(_weights(checkpoint, layout), sc.SpectralRConfig(columns=tuple(range(8))))
    generator = torch.Generator().manual_seed(0)
    moved = made.map_terms(lambda _, term: _moved(term, generator, 0.3))
    adapter_file.save(Adapter(moved.layers, Provenance(name=file.stem, family="sd1")), file)


def narrow_adapters(checkpoint: Path, folder: Path) -> None:
    """``foura`` (with a trained word), ``spectral``, ``rotated`` and ``lora`` for it, on both sides, none of
    them zero."""
    weights = _weights(checkpoint, UNetLayout.sd1())
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {
        "foura": sc.FouRAConfig(rank=4),
        "lora": sc.LoRAConfig(rank=4),
        "spectral": sc.SpectralAConfig(columns=(0, 1)),
    }
    for number, (name, config) in enumerate(made.items()):
        generator = torch.Generator().manual_seed(number)
        adapter = sc.create(weights, config, generator=generator)
        provenance = Provenance(name=name, family="sd1", trigger_words=(WORD,))
        moved = adapter.map_terms(lambda _, term, g=generator: _moved(term, g))
        tokens = {WORD: {"text_encoder": torch.randn(1, 768, generator=generator) * 0.02}}
        adapter_file.save(
            Adapter(moved.layers, provenance, tokens=tokens if name == "foura" else {}),
            folder / f"{name}.safetensors",
            overwrite=True,
        )
    rotated(checkpoint, UNetLayout.sd1(), folder / "rotated.safetensors")


def _moved(term: Any, generator: torch.Generator, spread: float = 0.05) -> Any:
    """Off zero, so that the adapter does something."""
    learned = {k for k in method_of(term.config).trainable(term.config) if not k.startswith("gate")}
    params = {
        k: v + (torch.randn(v.shape, generator=generator) * spread).to(v.dtype) if k in learned else v
        for k, v in term.params.items()
    }
    return type(term)(term.config, params)


def _weights(checkpoint: Path, layout: UNetLayout) -> dict[str, Tensor]:
    from safetensors import safe_open

    wanted = {
        f"unet.{path}": f"model.diffusion_model.{native}.weight"
        for path, native in unet_table(layout).items()
        if path.endswith(("attn2.to_k", "attn2.to_v", "attn1.to_q")) or ".resnets.1.conv1" in path
    }
    layers = "text_model.encoder.layers."
    wanted |= {
        f"text_encoder.{layers}{i}.mlp.fc1": f"cond_stage_model.transformer.{layers}{i}.mlp.fc1.weight"
        for i in range(0, 12, 4)
    }
    with safe_open(checkpoint, "pt") as file:
        known = set(file.keys())
        return {name: file.get_tensor(key).float() for name, key in wanted.items() if key in known}
