"""Strengths in words: curves and lists over the denoising, block weights, model and text encoder."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_core.adapter import block_strengths as block_weights
from spectral_core.adapter import schedule_words as schedule_curves
from spectral_core.adapter import strengths
from spectral_core.adapter.adapter import Adapter, AdapterLayer
from spectral_core.adapter.schedule import Schedule
from spectral_core.errors import SpectralAdapterError
from spectral_core.maths.layers import LayerShape

FORMULAS = {
    "constant": lambda x: 1.0,
    "linear in": lambda x: x,
    "linear out": lambda x: 1 - x,
    "cosine in": lambda x: math.sin(math.pi * x / 2) ** 2,
    "cosine out": lambda x: math.cos(math.pi * x / 2) ** 2,
    "bell": lambda x: math.sin(math.pi * x) ** 2,
}


@pytest.mark.parametrize("curve", FORMULAS)
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.2, 1.0), (0.0, 0.6), (0.3, 0.35)])
def test_curves_follow_their_formula_inside_and_are_zero_outside(
    curve: str, start: float, end: float
) -> None:
    schedule = schedule_curves.named(curve, start, end) or Schedule(((0.0, 1.0),))
    for i in range(1001):
        p = i / 1000
        inside = start <= p < end or (p == 1 and end == 1)
        expected = FORMULAS[curve]((p - start) / (end - start)) if inside else 0.0
        assert schedule.at(p) == pytest.approx(expected, abs=7e-4), (curve, p)


def test_full_strength_all_the_time_is_no_schedule() -> None:
    assert schedule_curves.named("constant") is None
    assert schedule_curves.named("constant", 0.0, 0.5) == Schedule.window(0.0, 0.5)


def test_custom_curve_is_of_the_whole_denoising_and_cut_by_the_window() -> None:
    schedule = schedule_curves.named("custom", 0.25, 1.0, "0:1; 0.5:0.3,\n1:0")
    assert schedule is not None
    assert [schedule.at(p) for p in (0.1, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([0, 0.65, 0.3, 0.15, 0])


@pytest.mark.parametrize("text", ["", "  ", "0.5", "a:1", "0:1:2", "1:0, 0:1", "0:nan", "2:1", "0:inf"])
def test_lists_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SpectralAdapterError, match=r"expected|place:strength"):
        schedule_curves.named("custom", points=text)


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.6, 0.4), (-0.1, 1), (0, 1.1)])
def test_windows_that_are_none(start: float, end: float) -> None:
    with pytest.raises(SpectralAdapterError, match="start below the end"):
        schedule_curves.named("bell", start, end)
    with pytest.raises(SpectralAdapterError, match="linear in"):
        schedule_curves.named("wobble")


places = st.lists(st.integers(0, 20), min_size=1, max_size=5).map(sorted)
schedules = places.flatmap(
    lambda ps: st.lists(st.floats(-2, 2), min_size=len(ps), max_size=len(ps)).map(
        lambda ms: Schedule(tuple((p / 20, m) for p, m in zip(ps, ms, strict=True)))
    )
)


@settings(max_examples=60, deadline=None)
@given(schedules, schedules)
def test_product_is_the_product(first: Schedule, second: Schedule) -> None:
    both = schedule_curves.product(first, second)
    for i in range(41):
        expected = first.at(i / 40) * second.at(i / 40)
        assert both.at(i / 40) == pytest.approx(expected, abs=16 / 1024 + 1e-9)
    for place, _ in (*first.points, *second.points):  # exact at their own places, steps included
        assert both.at(place) == pytest.approx(first.at(place) * second.at(place), abs=1e-9)


def adapter(*names: str, family: str = "sd1") -> Adapter:
    layers = {name: AdapterLayer(LayerShape(4, 4), ()) for name in names}
    made = Adapter(layers)
    return replace(made, provenance=replace(made.provenance, family=family))


A = "attentions.0.transformer_blocks.0.attn1.to_q"
SD = adapter(
    f"unet.down_blocks.0.{A}", f"unet.down_blocks.1.{A}", f"unet.down_blocks.1.{A}".replace("ns.0", "ns.1"),
    "unet.down_blocks.1.resnets.0.conv1", f"unet.mid_block.{A}", f"unet.up_blocks.1.{A}",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
    "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
)  # fmt: skip
N = list(SD.layers)


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        ("IN", [0, 1, 2, 3]), ("mid", [4]), ("OUT", [5, 6]), ("TE", [7]), ("BASE", [7]),
        ("down_blocks.1", [1, 2, 3]), ("mid_block", [4]), ("ff", [6]), ("to_q", [0, 1, 2, 4, 5]),
        ("attn1", [0, 1, 2, 4, 5]), ("unet", [0, 1, 2, 3, 4, 5, 6]), ("*.attentions.1.*", [2]),
        ("IN4", [1, 3]), ("IN05", [2]), ("OUT3", [5, 6]), ("IN1", [0]), (N[5], [5]), ("layers.1", [7]),
        ("text_encoder.text_model.encoder.layers.1.self_attn.q_proj", [7]),
    ],
)  # fmt: skip
def test_patterns_fit_the_blocks_they_name(pattern: str, hit: list[int]) -> None:
    weighted, (entry,) = block_weights.apply(SD, f"{pattern}: 0.5")
    assert [i for i, name in enumerate(N) if weighted.strength_of(name) != 1] == hit
    assert {weighted.strength_of(N[i]) for i in hit} == {0.5} and entry.layers == len(hit)


def test_native_and_fused_names() -> None:
    flux = adapter(
        "diffusion_model.double_blocks.0.img_attn.qkv[0:4]", "diffusion_model.single_blocks.1.linear1",
        "diffusion_model.input_blocks.4.1.proj_in", family="",
    )  # fmt: skip
    names = list(flux.layers)
    for pattern, hit in (("DOUBLE", 0), ("qkv", 0), ("SINGLE", 1), ("IN4", 2), ("img_attn", 0)):
        weighted, _ = block_weights.apply(flux, f"{pattern}=0.5")
        assert [i for i, n in enumerate(names) if weighted.strength_of(n) != 1] == [hit], pattern


def test_entries_multiply_and_comments_are_skipped() -> None:
    weighted, entries = block_weights.apply(SD, "IN: 0.5, to_q: -2 # both\n\n# none\n; ff=0")
    assert [weighted.strength_of(name) for name in N] == [-1, -1, -1, 0.5, -2, -2, 0, 1]
    assert len(entries) == 3 and block_weights.apply(SD, " \n")[1] == ()


@pytest.mark.parametrize("text", ["IN", "IN: x", ": 1", "IN: nan", "0.5", "IN: 1e999"])
def test_entries_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SpectralAdapterError, match="block weights"):
        block_weights.apply(SD, text)


@pytest.mark.parametrize("pattern", ["down_blocks.9", "DOUBLE", "IN11", "nothing", "down_blocks.1x"])
def test_what_fits_nothing_lists_what_there_is(pattern: str) -> None:
    with pytest.raises(SpectralAdapterError, match=r"fits no layer.*unet\.down_blocks\.0.*unet\.mid_block"):
        block_weights.apply(SD, f"{pattern}: 1")
    with pytest.raises(SpectralAdapterError, match="fits no layer"):  # a block's number ends at a dot
        block_weights.apply(adapter("unet.down_blocks.10.conv.a"), "down_blocks.1: 1")
    with pytest.raises(SpectralAdapterError, match="mini model are not known"):
        block_weights.apply(adapter(*N, family="mini"), "IN4: 1")


def test_sides() -> None:
    raw = adapter("kohya.lora_unet_x_y", "kohya.lora_te3_z", "unet.a.b", "text_encoder_2.c.d", "t5xxl.e.f")
    scaled = strengths.on_sides(raw, 0.5, 3.0)
    assert [scaled.strength_of(name) for name in raw.layers] == [0.5, 3.0, 0.5, 3.0, 3.0]
    bare = strengths.on_sides(adapter("double_blocks.0.q", "t5xxl.e.f"), 0.5, 3.0)
    assert [bare.strength_of(name) for name in bare.layers] == [0.5, 3.0]
    assert strengths.on_sides(raw, 2.0, 2.0).layer_strengths == ()
    assert strengths.on_sides(raw.only("unet.*"), 0.0, 5.0).strength == 0
    assert strengths.on_sides(raw.only("t5xxl.*"), 0.0, 5.0).strength == 5
    assert "strength 0.5 in 2 layers" in strengths.describe(scaled)
    assert torch.tensor(scaled.strength_of("unet.a.b")).item() == 0.5
