"""Tags of prompts: what they mean, what is refused and how it is said, and that they are written back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spectral_core.adapter.adapter import Adapter, AdapterLayer, Term
from spectral_core.errors import SpectralAdapterError
from spectral_core.maths.layers import LayerShape
from spectral_core.methods import LoRAConfig
from spectral_webui import infotext, request
from spectral_webui.request import Request

TAGS = [
    ("name", Request("name")),
    ("sub/name:0.7", Request("sub/name", 0.7)),
    ("name:0.7:0.4", Request("name", 0.7, 0.4)),
    ("name:unet=0.4", Request("name", 1.0, 0.4)),
    ("name:0.5:te=0.2", Request("name", 0.2)),
    ("name:1:start=0.2:stop=0.8", Request("name", start=0.2, stop=0.8)),
    ("name:1:curve=linear-in", Request("name", curve="linear in")),
    ("name:1:points=0/1,1/0", Request("name", points="0/1,1/0")),
    ("name:-1:mode=frozen:blocks=IN/0.5", Request("name", -1.0, mode="frozen", blocks="IN/0.5")),
]


@pytest.mark.parametrize(("text", "expected"), TAGS)
def test_a_tag_is_read_and_written_back(text: str, expected: Request) -> None:
    found = request.parse(text.split(":"))
    assert found == expected
    again = request.parse(request.tag(found).removeprefix("<spectral:").removesuffix(">").split(":"))
    assert again == replace(expected, unet=None if expected.unet == expected.te else expected.unet)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the adapter's name first"),
        ("te=1", "the adapter's name first"),
        ("name:strong", "te is 'strong'"),
        ("name:nan", "te is 'nan'"),
        ("name:1:1:1", "one number too many"),
        ("name:1:stpo=0.5", "did you mean stop"),
        ("name:1:start=0.8:stop=0.2", "a start below the end"),
        ("name:1:curve=bel", "expected one of constant"),
        ("name:1:points=0-1", "is no point"),
        ("name:1:mode=merge", "live or frozen"),
    ],
)
def test_a_mistake_is_named_with_the_tag(text: str, says: str) -> None:
    with pytest.raises(SpectralAdapterError, match=says) as error:
        request.parse(text.split(":"))
    assert str(error.value).startswith(f"<spectral:{text}>")


def adapter() -> Adapter:
    config = LoRAConfig(rank=1)
    layers = {}
    for name in (
        "unet.down_blocks.0.attentions.0.proj_in",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ):
        shape = LayerShape.of(torch.empty(3, 2))
        params = {"down": torch.ones(1, 2), "up": torch.ones(3, 1)}
        layers[name] = AdapterLayer(shape, (Term(config, params),))
    return Adapter(layers)


def test_strengths_schedule_and_blocks_reach_the_adapter() -> None:
    found = request.applied(adapter(), request.parse(["n", "0.5", "0.25", "stop=0.5", "blocks=IN/2"]))
    unet, text = found.layers
    assert (found.strength_of(unet), found.strength_of(text)) == (0.5, 0.5)
    assert found.schedule is not None
    assert [found.schedule.at(p) for p in (0.0, 0.49, 0.5, 1.0)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("key", "value", "after"),
    [
        ("strength", 0.3, "a <spectral:n:0.3> <lora:x:1>"),
        ("te", 0.3, "a <spectral:n:0.3:0.5> <lora:x:1>"),
        ("unet", 0.3, "a <spectral:n:0.5:0.3> <lora:x:1>"),
        ("curve", "bell", "a <spectral:n:0.5:curve=bell> <lora:x:1>"),
        ("name", "m", "a <spectral:m:0.5> <lora:x:1>"),
    ],
)
def test_axes_change_tags_and_nothing_else(key: str, value: object, after: str) -> None:
    assert request.with_setting("a <spectral:n:0.5> <lora:x:1>", key, value) == after


def test_unreadable_tags_stay_for_the_run_to_complain_about() -> None:
    assert request.with_setting("<spectral:n:strong>", "te", 1) == "<spectral:n:strong>"


def test_lines_of_the_field_become_tags() -> None:
    assert request.tags_in_lines("a:0.5\n\n <spectral:b:1> \n") == "<spectral:a:0.5><spectral:b:1>"


def test_a_renamed_file_is_found_by_its_hash() -> None:
    hashes = {"old": "0123456789ab", "kept": "ffff"}
    parameters = {"Prompt": "x <spectral:old:0.5> <spectral:kept:1>", infotext.KEY: infotext.entry(hashes)}
    infotext.pasted(parameters, {"0123456789ab": "new"}.get)
    assert parameters["Prompt"] == "x <spectral:new:0.5> <spectral:kept:1>"


def test_parameters_without_hashes_stay() -> None:
    parameters = {"Prompt": "x <spectral:old:0.5>"}
    infotext.pasted(parameters, {}.get)
    assert parameters == {"Prompt": "x <spectral:old:0.5>"}
