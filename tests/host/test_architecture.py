"""The demo model runs in ComfyUI's own classes: outputs as in diffusers and transformers, every tensor used.

Parts that are not in ``demo_model`` yet are taken with random weights of the configuration they are trained
with. The native form of the weights follows from ``spectral_core.keys`` (UNet, text encoder) and from the
level numbers (autoencoder: the host's own converter only knows four levels).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectral_core import keys
from spectral_core.keys import ModelLayout
from spectral_core.unet_layout import UNetLayout
from tests.host.booted import ROOT
from tests.host.inside import checkouts, run_inside

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.host

MODEL = ROOT / "demo_model"
HOST_VOCABULARY = 49408  # rows of the token table in the host's CLIP classes, whatever the configuration says
TOLERANCE = 1e-4
PROMPTS = (
    "",
    "a large red striped star on a blue background, on the left",
    "Small YELLOW heart;  it's   dotted!",
    "a zyxqv-bot 42 in a naïve café",  # words that no caption had
    " ".join(["green ring"] * 30),  # fills most of the 77 positions
)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give norms and biases values of their own; a fresh norm would hide a wrong name."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if tensor.ndim == 1:
            centre = 1.0 if name.endswith("weight") else 0.0
            tensor.data = centre + 0.2 * torch.randn(tensor.shape, generator=generator)
    return model


def shipped_or(kind: Any, folder: str, fresh: Callable[[], nn.Module]) -> Any:
    """The part as shipped in fp32; random weights while there are none."""
    torch.manual_seed(7)
    if (MODEL / folder / "config.json").is_file():
        return kind.from_pretrained(MODEL / folder, torch_dtype=torch.float32).eval()
    return randomise(fresh(), 7).eval()


@dataclass(frozen=True)
class Demo:
    unet: Any
    vae: Any
    text: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def demo() -> Demo:
    from tools.demo_training import autoencoder, unet
    from tools.demo_training.text import text_model

    tokenizer = transformers.CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    return Demo(
        shipped_or(
            diffusers.UNet2DConditionModel, "unet", lambda: diffusers.UNet2DConditionModel(**unet.CONFIG)
        ),
        shipped_or(diffusers.AutoencoderKL, "vae", lambda: diffusers.AutoencoderKL(**autoencoder.CONFIG)),
        shipped_or(transformers.CLIPTextModel, "text_encoder", lambda: text_model(tokenizer)),
        tokenizer,
    )


# The configurations, as the host's classes want them.


def host_unet_config(config: Any) -> dict[str, Any]:
    """Only for one width per attention head and equal counts of residual blocks, which the demo model has."""
    layout = UNetLayout.from_config(config)
    channels, layers = config.block_out_channels, config.layers_per_block
    (head,) = {c // n for c, n in zip(channels, config.attention_head_dim, strict=True)}
    return {
        "image_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": channels[0],
        "channel_mult": [c // channels[0] for c in channels],
        "num_res_blocks": [layers] * len(channels),
        "transformer_depth": [depth for level in layout.down for depth in level],
        "transformer_depth_middle": layout.mid,
        "transformer_depth_output": [depth for level in reversed(layout.up) for depth in reversed(level)],
        "context_dim": config.cross_attention_dim,
        "num_head_channels": head,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(config.use_linear_projection),
        "legacy": False,
    }


def host_vae_config(config: Any) -> dict[str, Any]:
    channels = config.block_out_channels
    ddconfig = {
        "double_z": True,
        "z_channels": config.latent_channels,
        "resolution": config.sample_size,
        "in_channels": config.in_channels,
        "out_ch": config.out_channels,
        "ch": channels[0],
        "ch_mult": [c // channels[0] for c in channels],
        "num_res_blocks": config.layers_per_block,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"ddconfig": ddconfig, "embed_dim": config.latent_channels}


def host_text_config(demo: Demo) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "hidden_act")
    names += ("max_position_embeddings", "eos_token_id")
    tokenizer = demo.tokenizer
    return {
        "config": {name: getattr(demo.text.config, name) for name in names},
        "special": {
            "start": tokenizer.bos_token_id,
            "end": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
        },
        "prompts": PROMPTS,
        "tokenizer_folder": str(MODEL / "tokenizer"),
    }


# The weights, with native keys.


def native_unet(unet: Any) -> dict[str, Tensor]:
    layout, native = ModelLayout.sd1(UNetLayout.from_config(unet.config)), {}
    for key, tensor in unet.state_dict().items():
        path, _, kind = key.rpartition(".")
        weight = keys.to_native(f"unet.{path}", layout)[0].removeprefix("diffusion_model.")
        native[weight.removesuffix("weight") + kind] = tensor
    return native


def native_text(text: Any) -> dict[str, Tensor]:
    """Keys inside ``clip_l.transformer.``; the token table filled up with zeros."""
    layout, native = ModelLayout.sd1(), {}
    for key, tensor in text.state_dict().items():
        path, _, kind = key.rpartition(".")
        weight = keys.to_native(f"text_encoder.{path}", layout)[0].removeprefix("clip_l.transformer.")
        native[weight.removesuffix("weight") + kind] = tensor
    table = "text_model.embeddings.token_embedding.weight"
    native[table] = nn.functional.pad(native[table], (0, 0, 0, HOST_VOCABULARY - len(native[table])))
    return native


def native_vae(vae: Any) -> dict[str, Tensor]:
    """The original code's names: levels finest first on both sides, attention as 1 x 1 convolutions."""
    last = len(vae.config.block_out_channels) - 1
    native = {}
    for key, tensor in vae.state_dict().items():
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


# Both sides.


def make_inputs() -> dict[str, Tensor]:
    """Not square, so that rows and columns cannot be exchanged; timesteps at both ends; a smooth picture, as
    the encoder is made for (noise gives latents in the hundreds).
    """
    generator = torch.Generator().manual_seed(3)
    blots = torch.rand(2, 3, 5, 3, generator=generator)
    return {
        "latents": torch.randn(2, 4, 16, 24, generator=generator),
        "timesteps": torch.tensor([999.0, 1.0]),
        "context": torch.randn(2, 77, 128, generator=generator),
        "picture": nn.functional.interpolate(blots, (64, 32), mode="bilinear", align_corners=True),
        "encoded": torch.randn(2, 4, 16, 8, generator=generator),
    }


@dataclass(frozen=True)
class Answer:
    """What the host reports and computes."""

    report: dict[str, Any]
    outputs: dict[str, Tensor]
    weights: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module", params=checkouts())
def answer(request: pytest.FixtureRequest, demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """One process per host version."""
    folder: Path = tmp_path_factory.mktemp("architecture")
    weights = {"unet": native_unet(demo.unet), "vae": native_vae(demo.vae), "text": native_text(demo.text)}
    for name, tensors in {**weights, "inputs": make_inputs()}.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")
    config = {"unet": host_unet_config(demo.unet.config), "vae": host_vae_config(demo.vae.config)}
    config["text"] = host_text_config(demo)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run_inside(request.param, "inside_architecture.py", folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Answer(report, load_file(folder / "outputs.safetensors"), weights)


def assert_same(name: str, host: Tensor, ours: Tensor) -> None:
    assert host.shape == ours.shape
    assert ours.std() > 0.01, f"{name}: an output of zeros would agree with anything"
    difference = (host - ours).abs().max().item()
    print(f"{name}: largest difference {difference:.2e}")
    assert difference <= TOLERANCE, name


@pytest.mark.parametrize(
    ("part", "lacking"), [("unet", []), ("vae", []), ("text", ["text_projection.weight"])]
)
def test_every_tensor_is_used_on_both_sides(
    answer: Answer, demo: Demo, part: str, lacking: list[str]
) -> None:
    """The host's text encoder has a projection that CLIPTextModel has not; SD 1.x never uses it."""
    assert answer.report[part]["unused"] == []
    assert answer.report[part]["lacking"] == lacking
    assert len(answer.weights[part]) == len(getattr(demo, part).state_dict())


def test_host_reads_the_same_unet_structure_off_the_weights(answer: Answer, demo: Demo) -> None:
    ours, detected = host_unet_config(demo.unet.config), answer.report["unet"]["detected"]
    assert len(detected) >= 9
    # image_size is a constant of the host's, which its UNet never reads
    assert {k: (v, ours[k]) for k, v in detected.items() if v != ours[k] and k != "image_size"} == {}


def test_unet(answer: Answer, demo: Demo) -> None:
    given = make_inputs()
    with torch.inference_mode():
        ours = demo.unet(given["latents"], given["timesteps"], given["context"]).sample
    assert_same("unet", answer.outputs["unet"], ours)


def test_autoencoder(answer: Answer, demo: Demo) -> None:
    given = make_inputs()
    with torch.inference_mode():
        encoded = demo.vae.encode(given["picture"] * 2 - 1).latent_dist.mode()
        decoded = demo.vae.decode(given["encoded"]).sample
    scale = demo.vae.config.scaling_factor  # as the denoiser sees them
    assert_same("encoder", answer.outputs["encoded"] * scale, encoded * scale)
    assert_same("decoder", answer.outputs["decoded"], ((decoded + 1) / 2).clamp(0, 1))


def test_tokens(answer: Answer, demo: Demo) -> None:
    ours = demo.tokenizer(list(PROMPTS), padding="max_length", max_length=77).input_ids
    assert answer.report["tokens"] == [[ids] for ids in ours]
    assert len({tuple(ids) for ids in ours}) == len(PROMPTS)


def test_text_encoder(answer: Answer, demo: Demo) -> None:
    ids = demo.tokenizer(list(PROMPTS), padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        ours = demo.text(ids)
    for i in range(len(PROMPTS)):
        assert_same(f"states of prompt {i}", answer.outputs[f"states_{i}"], ours.last_hidden_state[i : i + 1])
        assert_same(f"pooled of prompt {i}", answer.outputs[f"pooled_{i}"], ours.pooler_output[i : i + 1])
