"""Layer names against the real diffusers UNets, built on the meta device: every module with a weight maps
there and back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectral_core.names import spellings as keys
from spectral_core.names.spellings import ModelLayout
from spectral_core.names.unet_blocks import UNetLayout, unet_table

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
CROSS_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": dict(down_block_types=CROSS, up_block_types=CROSS_UP, cross_attention_dim=768),
    "sd2": dict(
        down_block_types=CROSS,
        up_block_types=CROSS_UP,
        cross_attention_dim=1024,
        attention_head_dim=[5, 10, 20, 20],
        use_linear_projection=True,
    ),
    "sdxl": dict(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    ),
    "miniature": dict(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
    ),
    "uneven": dict(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=[1, 2],
        transformer_layers_per_block=[1, 2],
        cross_attention_dim=64,
    ),
    "middle without attention": dict(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_every_module_of_a_real_unet(case: str) -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**CONFIGS[case])
    layout = UNetLayout.from_config(unet.config)
    if case in keys.LAYOUTS:
        assert layout == keys.LAYOUTS[case]().unet
    model = ModelLayout.sd1(layout)
    paths = [n for n, m in unet.named_modules() if getattr(m, "weight", None) is not None]
    table = unet_table(layout)
    assert not set(paths) - set(table), "modules without a native name"
    missing = {p for p in set(table) - set(paths) if not p.endswith("conv_shortcut")}
    assert not missing, "names without a module"
    for path in paths:
        name = f"unet.{path}"
        assert keys.from_native(keys.to_native(name, model)[0], model) == name
        assert keys.from_kohya(keys.to_kohya(name, False)) == name


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_every_module_of_a_real_text_encoder(kind: str) -> None:
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    modules = dict(model.named_modules())
    paths = [n for n, m in modules.items() if getattr(m, "weight", None) is not None]
    assert len(paths) >= 19
    for path in paths:
        canonical = keys.canonical_path(path)
        assert canonical.startswith(("text_model.", "text_projection"))
        assert path in [p for p in keys.path_spellings(canonical) if p in modules]
        name = f"text_encoder.{canonical}"
        assert keys.from_kohya(keys.to_kohya(f"text_encoder.{path}", False)) == name
        assert keys.from_native(keys.to_native(name, ModelLayout.sd1())[0], ModelLayout.sd1()) == name
