"""Every LoRA key that the pack writes is one that the host knows, for the same weight; and every one that the
host knows is read as the same layer.

The host's side are its own maps on its own models, built on the meta device from the weight names of real
diffusers UNets. What differs on purpose: the host has no LoRA keys for the text encoders' norms and
embeddings, and it takes SD 2.x's name ``class_embedding`` for SDXL's ``add_embedding`` too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from spectral_core.names import spellings as keys
from spectral_core.names.spellings import ModelLayout
from spectral_core.names.unet_blocks import UNetLayout
from tests.host.inside import checkouts, run_inside

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.host

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
UNETS: dict[str, dict[str, Any]] = {
    "sd1": dict(cross_attention_dim=768),
    "sd2": dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    "sdxl": dict(
        block_out_channels=(320, 640, 1280),
        down_block_types=(PLAIN, CROSS, CROSS),
        up_block_types=(CROSS_UP, CROSS_UP, PLAIN_UP),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    ),
    # Built like the demo model: one residual block per level, attention in the middle level only.
    "miniature": dict(
        block_out_channels=(64, 64, 128),
        down_block_types=(PLAIN, CROSS, PLAIN),
        up_block_types=(PLAIN_UP, CROSS_UP, PLAIN_UP),
        layers_per_block=1,
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=128,
    ),
}
FAMILIES = tuple(UNETS)
HOST_MODELS = {  # the class that the host must take the UNet for, and its text encoders
    "sd1": ("SD15", "comfy.sd1_clip.SD1ClipModel"),
    "sd2": ("SD20", "comfy.text_encoders.sd2_clip.SD2ClipModel"),
    "sdxl": ("SDXL", "comfy.sdxl_clip.SDXLClipModel"),
    "miniature": ("BASE", "comfy.sd1_clip.SD1ClipModel"),
}
SMALL_CLIP, MIDDLE_CLIP, LARGE_CLIP = (12, 768, 3072), (24, 1024, 4096), (32, 1280, 5120)
TEXT_ENCODERS: dict[
    str, dict[str, tuple[str, tuple[int, int, int]]]
] = {  # class and layers, width, inner width
    "sd1": {"text_encoder": ("CLIPTextModel", SMALL_CLIP)},
    "sd2": {"text_encoder": ("CLIPTextModel", MIDDLE_CLIP)},
    "sdxl": {
        "text_encoder": ("CLIPTextModel", SMALL_CLIP),
        "text_encoder_2": ("CLIPTextModelWithProjection", LARGE_CLIP),
    },
}
TEXT_ENCODERS["miniature"] = TEXT_ENCODERS["sd1"]
NO_HOST_KEY = ("token_embedding", "position_embedding", "final_layer_norm", "layer_norm1", "layer_norm2")


@cache
def unet_of(family: str) -> tuple[ModelLayout, dict[str, list[int]]]:
    """(layout, shape of every tensor) of a diffusers UNet."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**UNETS[family])
    layout = keys.LAYOUTS[family]() if family in keys.LAYOUTS else None
    layout = layout or ModelLayout.sd1(UNetLayout.from_config(unet.config))
    return layout, {key: list(tensor.shape) for key, tensor in unet.state_dict().items()}


@cache
def text_encoder_of(kind: str, sizes: tuple[int, int, int]) -> dict[str, list[int]]:
    """Shape of every tensor of a transformers text encoder."""
    config = transformers.CLIPTextConfig(
        num_hidden_layers=sizes[0], hidden_size=sizes[1], intermediate_size=sizes[2],
        num_attention_heads=sizes[1] // 64, projection_dim=sizes[1],
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    return {key: list(tensor.shape) for key, tensor in model.state_dict().items()}


def layers_of(family: str) -> Iterator[tuple[str, list[int]]]:
    """(layer name, weight shape) of every module with a weight, UNet and text encoders."""
    parts = {"unet": unet_of(family)[1]}
    parts |= {part: text_encoder_of(*which) for part, which in TEXT_ENCODERS[family].items()}
    for part, shapes in parts.items():
        for key, shape in shapes.items():
            if key.endswith(".weight"):
                yield f"{part}.{key.removesuffix('.weight')}", shape


def native_shapes(family: str) -> dict[str, list[int]]:
    layout, shapes = unet_of(family)
    native = {}
    for key, shape in shapes.items():
        path, _, tensor = key.rpartition(".")
        weight = keys.to_native(f"unet.{path}", layout)[0].removeprefix("diffusion_model.")
        native[weight.removesuffix("weight") + tensor] = shape
    return native


@pytest.fixture(scope="module", params=checkouts())
def maps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the host answers for all families; one process per version."""
    question = {}
    for family, (_, clip) in HOST_MODELS.items():
        known = family in keys.LAYOUTS
        shapes = unet_of(family)[1] if known else native_shapes(family)
        question[family] = {"spelling": "diffusers" if known else "native", "unet": shapes, "clip": clip}
    folder = tmp_path_factory.mktemp("key_maps")
    (folder / "question.json").write_text(json.dumps(question), encoding="utf-8")
    run_inside(request.param, "inside_key_maps.py", folder)
    return dict(json.loads((folder / "answer.json").read_text(encoding="utf-8")))


def test_host_takes_each_unet_for_the_right_model(maps: dict[str, Any]) -> None:
    assert {family: maps[family]["kind"] for family in FAMILIES} == {f: m[0] for f, m in HOST_MODELS.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_native_names_are_exactly_the_weights_of_the_host(maps: dict[str, Any], family: str) -> None:
    """Both ways, with equal shapes; the host's text encoders alone have more: a projection of their own."""
    layout = unet_of(family)[0]
    ours = {keys.to_native(name, layout)[0]: shape for name, shape in layers_of(family)}
    host = maps[family]["shapes"]
    assert {key: shape for key, shape in ours.items() if host.get(key) != shape} == {}
    extra = {"clip_l.transformer.text_projection.weight", "clip_h.transformer.text_projection.weight"}
    assert set(host) - set(ours) <= extra
    assert all(keys.from_native(key, layout) is not None for key in host)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_written_key_means_the_same_weight_to_the_host(maps: dict[str, Any], family: str) -> None:
    layout, two = unet_of(family)[0], family == "sdxl"
    host = maps[family]["unet"] | maps[family]["clip"]
    unknown, different, same = set(), {}, 0
    for name, _ in layers_of(family):
        key, native = keys.to_kohya(name, two), keys.to_native(name, layout)[0]
        if key not in host:
            unknown.add(name)
        elif host[key] != native:  # a weight with an offset would be a list
            different[key] = (host[key], native)
        else:
            same += 1
    assert different == {}
    assert {name for name in unknown if not name.endswith(NO_HOST_KEY)} == set()
    assert all(name.startswith("text_encoder") for name in unknown)
    assert same > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_host_is_read_as_the_same_layer(maps: dict[str, Any], family: str) -> None:
    """Also the native spelling of UNet keys, and both prefixes of a single text encoder."""
    layout, shapes = unet_of(family)[0], maps[family]["shapes"]
    host = maps[family]["unet"] | maps[family]["clip"]
    read = {
        key: (keys.from_kohya(key, layout.unet), target)
        for key, target in host.items()
        if key.startswith(("lora_unet_", "lora_te")) and target in shapes and "class_embedding" not in key
    }
    assert {key: found for key, found in read.items() if found[0] is None} == {}
    assert {k: f for k, f in read.items() if keys.to_native(f[0], layout)[0] != f[1]} == {}
    assert len(read) > 300
