"""A UNet's layout read off its native module names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectral_core.errors import SpectralAdapterError
from spectral_core.names.unet_blocks import UNetLayout, halvings, unet_table

DEMO = Path(__file__).resolve().parents[3] / "demo_model" / "unet" / "config.json"
LAYOUTS = {
    "sd1": UNetLayout.sd1(),
    "sdxl": UNetLayout.sdxl(),
    "demo": UNetLayout.from_config(json.loads(DEMO.read_text(encoding="utf-8"))),
    "three blocks a level": UNetLayout.symmetric((1, 0), layers=3),
    "no transformers": UNetLayout(((0, 0),), 0, ((0, 0, 0),)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_found_again(name: str) -> None:
    assert UNetLayout.from_native(unet_table(LAYOUTS[name]).values()) == LAYOUTS[name]


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(SpectralAdapterError, match="no UNet"):
        UNetLayout.from_native(["double_blocks.0.img_attn.qkv"])


def test_halvings_of_layers_with_some_blocks_left_out() -> None:
    names = [
        f"unet.{side}_blocks.{i}.attentions.0.x"
        for side, found in (("down", (0, 1, 2)), ("up", (1, 2, 3)))
        for i in found
    ]
    assert list(halvings([*names, "unet.mid_block.attentions.0.x"]).values()) == [0, 1, 2, 2, 1, 0, 3]
    assert halvings(["transformer.blocks.0.x", "unet.conv_in"]) == {}
