"""What a linear layer is for, on the trees of the field: attention, feed-forward, or neither, and why."""

from __future__ import annotations

import pytest

from spectral_core.attach.roles import BOTH, FEED_FORWARD, FEEDS, FOLLOWS, role_of, roles

H, WIDE = 8, 32
SQUARE, UP, DOWN = (H, H), (WIDE, H), (H, WIDE)

# name -> (layers as path -> (size, what it is for), other modules)
TREES: dict[str, tuple[dict[str, tuple[tuple[int, int], str | None]], tuple[str, ...]]] = {
    "a UNet of diffusers": (
        {
            "time_embedding.linear_1": (UP, None),
            "time_embedding.linear_2": ((WIDE, WIDE), None),
            "down_blocks.0.resnets.0.time_emb_proj": ((H, WIDE), None),
            "down_blocks.0.attentions.1.proj_in": (SQUARE, None),
            "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (SQUARE, FEEDS),
            "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_k": (SQUARE, FEEDS),
            "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v": (SQUARE, FEEDS),
            "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0": (SQUARE, FOLLOWS),
            "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj": ((2 * WIDE, H), FEED_FORWARD),
            "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.2": (DOWN, FEED_FORWARD),
            "down_blocks.0.attentions.1.proj_out": (SQUARE, None),
        },
        (),
    ),
    "a text encoder of BERT's": (
        {
            "encoder.layer.0.attention.self.query": (SQUARE, FEEDS),
            "encoder.layer.0.attention.self.key": (SQUARE, FEEDS),
            "encoder.layer.0.attention.self.value": (SQUARE, FEEDS),
            "encoder.layer.0.attention.output.dense": (SQUARE, FOLLOWS),
            "encoder.layer.0.intermediate.dense": (UP, FEED_FORWARD),
            "encoder.layer.0.output.dense": (DOWN, FEED_FORWARD),
            "pooler.dense": (SQUARE, None),
        },
        (),
    ),
    "T5's": (
        {
            **{f"encoder.block.0.layer.0.SelfAttention.{x}": (SQUARE, FEEDS) for x in "qkv"},
            "encoder.block.0.layer.0.SelfAttention.o": (SQUARE, FOLLOWS),
            "encoder.block.0.layer.1.DenseReluDense.wi_0": (UP, FEED_FORWARD),
            "encoder.block.0.layer.1.DenseReluDense.wi_1": (UP, FEED_FORWARD),
            "encoder.block.0.layer.1.DenseReluDense.wo": (DOWN, FEED_FORWARD),
        },
        (),
    ),
    "Flux: fused, and single blocks": (
        {
            "double_blocks.0.img_mod.lin": ((6 * H, H), None),
            "double_blocks.0.img_attn.qkv": ((3 * H, H), FEEDS),
            "double_blocks.0.img_attn.proj": (SQUARE, FOLLOWS),
            "double_blocks.0.img_mlp.0": (UP, FEED_FORWARD),
            "double_blocks.0.img_mlp.2": (DOWN, FEED_FORWARD),
            "single_blocks.0.linear1": ((3 * H + WIDE, H), BOTH),
            "single_blocks.0.linear2": ((H, H + WIDE), BOTH),
            "single_blocks.0.modulation.lin": ((3 * H, H), None),
            "final_layer.linear": (SQUARE, None),
        },
        ("single_blocks.0.norm.query_norm", "single_blocks.0.norm.key_norm"),
    ),
    "Flux 2: its single blocks are gated": (
        {
            "single_blocks.0.linear1": ((3 * H + 2 * WIDE, H), BOTH),
            "single_blocks.0.linear2": ((H, H + WIDE), BOTH),
        },
        ("single_blocks.0.norm.query_norm",),
    ),
    "the same sizes without a norm of queries": (
        {"blocks.0.linear1": ((4 * H, H), None), "blocks.0.linear2": ((H, 2 * H), None)},
        ("blocks.0.norm",),
    ),
    "a gate, and fewer keys than queries": (
        {
            "blocks.0.attn.wq": (SQUARE, FEEDS),
            "blocks.0.attn.wk": ((4, H), FEEDS),
            "blocks.0.attn.wv": ((4, H), FEEDS),
            "blocks.0.attn.gate": (SQUARE, FOLLOWS),
            "blocks.0.attn.wo": (SQUARE, FOLLOWS),
            "blocks.0.mlp.gate": (UP, FEED_FORWARD),
            "blocks.0.mlp.up": (UP, FEED_FORWARD),
            "blocks.0.mlp.down": (DOWN, FEED_FORWARD),
            "txtmlp.1": (SQUARE, None),
            "txtmlp.3": (SQUARE, None),
        },
        (),
    ),
    "a processor that holds the projections": (
        {
            "blocks.0.attn.to_out.0": (SQUARE, FOLLOWS),
            **{f"blocks.0.attn.processor.img_to_{x}": (SQUARE, FEEDS) for x in "qkv"},
            "blocks.0.attn.processor.img_out": (SQUARE, FOLLOWS),
            "blocks.0.norm1.linear": ((4 * H, H), None),
        },
        (),
    ),
    "a block that makes its queries itself": (
        {
            "blocks.0.norm1.linear": ((6 * H, H), None),
            **{f"blocks.0.{x}": (SQUARE, FEEDS) for x in "qkv"},
            "blocks.0.attn_out": (SQUARE, FOLLOWS),
            "blocks.0.ff_proj": (UP, FEED_FORWARD),
            "blocks.0.ff_out": (DOWN, FEED_FORWARD),
        },
        (),
    ),
    "two streams below one name": (
        {
            "blocks.0.attn.proj_qkv.vid": ((3 * H, H), FEEDS),
            "blocks.0.attn.proj_qkv.txt": ((3 * H, H), FEEDS),
            "blocks.0.attn.proj_out.vid": (SQUARE, FOLLOWS),
            "blocks.0.mlp.vid.proj_in_gate": (UP, FEED_FORWARD),
            "blocks.0.mlp.vid.proj_out": (DOWN, FEED_FORWARD),
            "blocks.0.mlp.vid.proj_in": (UP, FEED_FORWARD),
        },
        (),
    ),
    "steps of a list, each for itself": (
        {
            "blocks.b0.blocks.0.block.attn.to_q.0": (SQUARE, FEEDS),
            "blocks.b0.blocks.0.block.attn.to_kv.0": ((2 * H, H), FEEDS),
            "blocks.b0.blocks.0.block.attn.to_out.0": (SQUARE, FOLLOWS),
            "blocks.b0.blocks.0.adaLN_modulation.1": ((4, H), None),
            "blocks.b0.blocks.0.adaLN_modulation.2": ((H, 4), None),
            "blocks.b0.blocks.1.block.layer1": (UP, FEED_FORWARD),
            "blocks.b0.blocks.1.block.layer2": (DOWN, FEED_FORWARD),
        },
        (),
    ),
    "what is no feed-forward: narrower, embeddings, another list": (
        {
            "blocks.0.attn.qkv": ((3 * H, H), FEEDS),
            "blocks.0.compress": ((4, WIDE), None),
            "blocks.0.expand": ((WIDE, 4), None),
            "blocks.0.before_proj": (SQUARE, None),
            "blocks.0.after_proj": (SQUARE, None),
            "blocks.0.time_pos_embed.0": (UP, None),
            "blocks.0.time_pos_embed.2": (DOWN, None),
            "t_embedder.mlp.0": (UP, None),
            "t_embedder.mlp.2": (DOWN, None),
            "res_blocks.0.mlp.0": (UP, None),
            "res_blocks.0.mlp.2": (DOWN, None),
        },
        (),
    ),
    "keys and values alone attend to nothing": (
        {"blocks.0.kv_mapper.1": (SQUARE, None), "blocks.0.key": (SQUARE, None), "out": (SQUARE, None)},
        (),
    ),
    "one block, without a list": (
        {
            **{f"attn.{x}_proj": (SQUARE, FEEDS) for x in "qkv"},
            "attn.o_proj": (SQUARE, FOLLOWS),
            "mlp.up_proj": (UP, FEED_FORWARD),
            "mlp.down_proj": (DOWN, FEED_FORWARD),
            "head": (SQUARE, None),
        },
        (),
    ),
}


@pytest.mark.parametrize("tree", TREES)
def test_roles(tree: str) -> None:
    layers, others = TREES[tree]
    found = roles({path: size for path, (size, _) in layers.items()}, [*layers, *others])
    assert {path: found.get(path) for path in layers} == {path: role for path, (_, role) in layers.items()}


@pytest.mark.parametrize(
    ("step", "role"),
    [
        ("to_q", "q"), ("w1q", "q"), ("wq", "q"), ("Wqkv", "qkv"), ("img_attn_qkv", "qkv"),
        ("kv_linear", "kv"), ("add_k_proj", "k"), ("v_img", "v"), ("query", "q"), ("query_key_value", "qkv"),
        ("c_attn", "qkv"), ("attn", None), ("self_attention", None), ("keys", None), ("o", None),
        ("0", None), ("qk", "qk"),
    ],
)  # fmt: skip
def test_words_of_names(step: str, role: str | None) -> None:
    assert role_of(step) == role
