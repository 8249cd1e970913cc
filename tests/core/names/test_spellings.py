"""Layer names: known pairs, round trips, injectivity, and unflattening of kohya names for any layout."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_core.errors import SpectralAdapterError
from spectral_core.names import spellings as keys
from spectral_core.names.spellings import ModelLayout
from spectral_core.names.unet_blocks import UNetLayout, unet_table

LAYOUTS = {name: make() for name, make in keys.LAYOUTS.items()}
MINIATURE = ModelLayout.sd1(UNetLayout.symmetric((0, 1, 1), layers=1))

# Pairs read off real SD 1.5 / SDXL checkpoints, not derived from the table under test.
KNOWN = [
    ("sd1", "unet.conv_in", "diffusion_model.input_blocks.0.0.weight"),
    (
        "sd1",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
    ),
    ("sd1", "unet.down_blocks.0.downsamplers.0.conv", "diffusion_model.input_blocks.3.0.op.weight"),
    ("sd1", "unet.down_blocks.2.attentions.1.proj_in", "diffusion_model.input_blocks.8.1.proj_in.weight"),
    ("sd1", "unet.down_blocks.3.resnets.1.conv2", "diffusion_model.input_blocks.11.0.out_layers.3.weight"),
    (
        "sd1",
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
    ),
    ("sd1", "unet.mid_block.resnets.1.time_emb_proj", "diffusion_model.middle_block.2.emb_layers.1.weight"),
    ("sd1", "unet.up_blocks.0.upsamplers.0.conv", "diffusion_model.output_blocks.2.1.conv.weight"),
    ("sd1", "unet.up_blocks.1.upsamplers.0.conv", "diffusion_model.output_blocks.5.2.conv.weight"),
    (
        "sd1",
        "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0",
        "diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.weight",
    ),
    (
        "sdxl",
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
        "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
    ),
    (
        "sdxl",
        "unet.up_blocks.0.attentions.2.transformer_blocks.9.attn1.to_v",
        "diffusion_model.output_blocks.2.1.transformer_blocks.9.attn1.to_v.weight",
    ),
    ("sdxl", "unet.up_blocks.0.upsamplers.0.conv", "diffusion_model.output_blocks.2.2.conv.weight"),
    ("sdxl", "unet.add_embedding.linear_2", "diffusion_model.label_emb.0.2.weight"),
    (
        "sd1",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    ),
    (
        "sd2",
        "text_encoder.text_model.encoder.layers.22.mlp.fc1",
        "clip_h.transformer.text_model.encoder.layers.22.mlp.fc1.weight",
    ),
    (
        "sdxl",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
        "clip_g.transformer.text_model.encoder.layers.31.mlp.fc2.weight",
    ),
]


@pytest.mark.parametrize(("family", "name", "native"), KNOWN)
def test_known_native_names(family: str, name: str, native: str) -> None:
    assert keys.to_native(name, LAYOUTS[family]) == (native, None)
    assert keys.from_native(native, LAYOUTS[family]) == name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (
            "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0",
            "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
        ),
        ("lora_unet_up_blocks_1_resnets_2_conv_shortcut", "unet.up_blocks.1.resnets.2.conv_shortcut"),
        ("lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"),
        ("lora_unet_time_embedding_linear_1", "unet.time_embedding.linear_1"),
        (
            "lora_te_text_model_encoder_layers_11_self_attn_out_proj",
            "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
        ),
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        ),
        ("lora_te2_text_projection", "text_encoder_2.text_projection"),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
            "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
        ),
        ("lora_unet_output_blocks_5_0_in_layers_2", "unet.up_blocks.1.resnets.2.conv1"),
        ("lora_unet_label_emb_0_0", "unet.add_embedding.linear_1"),
        ("lora_unet_double_blocks_0_img_attn_qkv", None),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", None),
        ("lora_unet_text_model_encoder_layers_0_mlp_fc1", None),
        ("lora_te_down_blocks_0_resnets_0_conv1", None),
        ("unet.conv_in", None),
        ("", None),
    ],
)
def test_kohya_names(key: str, name: str | None) -> None:
    assert keys.from_kohya(key) == name


def test_native_kohya_names_follow_the_given_layout() -> None:
    key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    assert keys.from_kohya(key) is None, "SDXL has no attention there"
    expected = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert keys.from_kohya(key, UNetLayout.sd1()) == expected


@pytest.mark.parametrize("family", LAYOUTS)
def test_every_module_of_a_family_round_trips(family: str) -> None:
    layout = LAYOUTS[family]
    names = [f"unet.{path}" for path in unet_table(layout.unet)]
    two = family == "sdxl"
    flat = [keys.to_kohya(name, two) for name in names]
    assert [keys.from_kohya(key) for key in flat] == names
    assert len(set(flat)) == len(names) and not any("." in key for key in flat)
    native = [keys.to_native(name, layout)[0] for name in names]
    assert [keys.from_native(key, layout) for key in native] == names and len(set(native)) == len(names)


@pytest.mark.parametrize(("family", "count"), [("sd1", 128), ("sd2", 128), ("sdxl", 560)])
def test_count_of_attention_projections(family: str, count: int) -> None:
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0")
    assert sum(path.endswith(ends) for path in unet_table(LAYOUTS[family].unet)) == count


depths = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)


@settings(deadline=None, max_examples=60)
@given(depths, st.integers(1, 3), st.sampled_from(["", "add_embedding", "class_embedding"]))
def test_any_layout_is_injective_and_round_trips(depth: tuple[int, ...], layers: int, label: str) -> None:
    unet = UNetLayout.symmetric(depth, layers, label)
    layout = ModelLayout.sd1(unet)
    table = unet_table(unet)
    assert len(set(table.values())) == len(table)
    for path in table:
        name = f"unet.{path}"
        assert keys.from_native(keys.to_native(name, layout)[0], layout) == name
        assert keys.from_kohya(keys.to_kohya(name, False), unet) == name
        # the native spelling, flattened, is read too wherever it is not a diffusers word at the same time
        assert keys.from_kohya("lora_unet_" + table[path].replace(".", "_"), unet) == name


@given(st.text(max_size=60))
def test_any_word_is_answered(word: str) -> None:
    path = keys.unflatten(word)
    assert path is None or path.replace(".", "_") == word
    name = keys.from_kohya("lora_unet_" + word)
    assert name is None or name.startswith("unet.")


@given(
    st.integers(0, 99), st.sampled_from(["self_attn.q_proj", "self_attn.out_proj", "mlp.fc2"]), st.booleans()
)
def test_text_encoder_names_round_trip(layer: int, leaf: str, two: bool) -> None:
    layout = LAYOUTS["sdxl" if two else "sd1"]
    for part in ("text_encoder", "text_encoder_2") if two else ("text_encoder",):
        name = f"{part}.text_model.encoder.layers.{layer}.{leaf}"
        assert keys.from_kohya(keys.to_kohya(name, two)) == name
        assert keys.from_native(keys.to_native(name, layout)[0], layout) == name


@pytest.mark.parametrize(
    ("path", "canonical"),
    [
        ("encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("final_layer_norm", "text_model.final_layer_norm"),
        ("embeddings.token_embedding", "text_model.embeddings.token_embedding"),
        ("text_projection", "text_projection"),
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.q"),
        ("encoder.final_layer_norm", "encoder.final_layer_norm"),
        ("down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv1"),
    ],
)
def test_text_encoder_paths_are_the_same_in_every_transformers(path: str, canonical: str) -> None:
    assert keys.canonical_path(path) == canonical
    assert path in keys.path_spellings(canonical) and keys.path_spellings(canonical)[0] == canonical


def test_names_without_dots_and_prefix_per_encoder() -> None:
    bare = "text_encoder.encoder.layers.0.mlp.fc1"  # as transformers 5 has it
    assert keys.to_kohya(bare, False) == "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert keys.to_kohya(bare, True) == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    assert keys.to_native(bare, LAYOUTS["sd1"])[0].startswith("clip_l.transformer.text_model.")
    raw = "lora_unet_double_blocks_0_img_attn_qkv"
    assert keys.to_kohya(f"kohya.{raw}", True) == raw
    assert keys.to_kohya("diffusion_model.double_blocks.0.img_attn.qkv", False) == raw


def test_two_encoders_are_told_by_family_parts_or_depth() -> None:
    shallow = ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "text_encoder.x.y"]
    assert not keys.has_two_encoders(shallow)
    assert keys.has_two_encoders(shallow, "sdxl")
    assert keys.has_two_encoders([*shallow, "text_encoder_2.x"])
    assert keys.has_two_encoders(["unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q"])


def test_refusals_name_the_layer_and_what_was_expected() -> None:
    with pytest.raises(SpectralAdapterError, match=r"unet\.nowhere.*sd1.*expected names such as"):
        keys.to_native("unet.nowhere", LAYOUTS["sd1"])
    with pytest.raises(SpectralAdapterError, match=r"qkv\[0:4\].*rows of a fused"):
        keys.to_kohya("diffusion_model.qkv[0:4]", False)
    with pytest.raises(SpectralAdapterError, match=r"vae\.x.*'vae'"):
        keys.to_kohya("vae.x", False)
    with pytest.raises(SpectralAdapterError, match="AttnDownBlock2D"):
        UNetLayout.from_config({"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["UpBlock2D"]})
    assert keys.to_native("diffusion_model.a.b[0:4]", LAYOUTS["sd1"]) == (
        "diffusion_model.a.b.weight",
        (0, 4),
    )
    assert keys.from_native("diffusion_model.nowhere.weight", LAYOUTS["sd1"]) is None
    assert keys.from_native("first_stage_model.x", LAYOUTS["sd1"]) is None
