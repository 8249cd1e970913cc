"""Checkpoints of about two megabytes that the host's own loader takes for SD 1.x and SD3.

Every weight is an overlapping view of a short random vector, which ``torch.save`` stores once; so even a
whole CLIP-L (123 million numbers) costs little on disk. What detection looks at is as in a real checkpoint:
widths, names, the fused q,k,v of SD3. The pictures are noise.

Shapes: as listed below; a convolution's kernel is 3 x 3 unless it says 1.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

STRIDES = (13, 5, 3, 1)
Shape = tuple[int, ...]
Shapes = dict[str, Shape]
SD3_WIDTH = 128


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})}


def conv(name: str, out: int, into: int, kernel: int = 3, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into, kernel, kernel), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def resnet(name: str, into: int, out: int = 320) -> Shapes:
    made = norm(f"{name}.in_layers.0", into) | conv(f"{name}.in_layers.2", out, into)
    made |= linear(f"{name}.emb_layers.1", out, 1280)
    made |= norm(f"{name}.out_layers.0", out) | conv(f"{name}.out_layers.3", out, out)
    return made if into == out else made | conv(f"{name}.skip_connection", out, into, 1)


def transformer(name: str, width: int = 320, context: int = 768) -> Shapes:
    made = norm(f"{name}.norm", width)
    made |= conv(f"{name}.proj_in", width, width, 1) | conv(f"{name}.proj_out", width, width, 1)
    block = f"{name}.transformer_blocks.0"
    for attention, source in (("attn1", width), ("attn2", context)):
        made |= linear(f"{block}.{attention}.to_q", width, width, bias=False)
        made |= linear(f"{block}.{attention}.to_k", width, source, bias=False)
        made |= linear(f"{block}.{attention}.to_v", width, source, bias=False)
        made |= linear(f"{block}.{attention}.to_out.0", width, width)
    made |= linear(f"{block}.ff.net.0.proj", 8 * width, width) | linear(f"{block}.ff.net.2", width, 4 * width)
    for i in (1, 2, 3):
        made |= norm(f"{block}.norm{i}", width)
    return made


def unet() -> Shapes:
    """SD 1.x with one level, one transformer and no middle block: 13.6 million numbers."""
    made = linear("time_embed.0", 1280, 320) | linear("time_embed.2", 1280, 1280)
    made |= conv("input_blocks.0.0", 320, 4)
    made |= resnet("input_blocks.1.0", 320) | transformer("input_blocks.1.1")
    made |= resnet("output_blocks.0.0", 640) | resnet("output_blocks.1.0", 640)
    return made | norm("out.0", 320) | conv("out.2", 4, 320)


def mmdit(width: int = SD3_WIDTH, depth: int = 2) -> Shapes:
    """SD3's transformer; its depth is read off its width (64 per block)."""
    made = conv("x_embedder.proj", width, 16, 2) | linear("context_embedder", width, 4096)
    made["pos_embed"] = (1, 1024, width)
    for name, into in (("t_embedder", 256), ("y_embedder", 2048)):
        made |= linear(f"{name}.mlp.0", width, into) | linear(f"{name}.mlp.2", width, width)
    for i in range(depth):
        for side in ("x_block", "context_block"):
            block, ends = f"joint_blocks.{i}.{side}", side == "context_block" and i == depth - 1
            made |= linear(f"{block}.attn.qkv", 3 * width, width)
            made |= linear(f"{block}.adaLN_modulation.1", (2 if ends else 6) * width, width)
            if not ends:  # the last context block only feeds the attention
                made |= linear(f"{block}.attn.proj", width, width)
                made |= linear(f"{block}.mlp.fc1", 4 * width, width)
                made |= linear(f"{block}.mlp.fc2", width, 4 * width)
    made |= linear("final_layer.linear", 64, width)
    return made | linear("final_layer.adaLN_modulation.1", 2 * width, width)


def clip_l(width: int = 768, layers: int = 12) -> Shapes:
    made: Shapes = {
        "embeddings.token_embedding.weight": (49408, width),
        "embeddings.position_embedding.weight": (77, width),
    }
    for i in range(layers):
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            made |= linear(f"encoder.layers.{i}.self_attn.{projection}", width, width)
        made |= norm(f"encoder.layers.{i}.layer_norm1", width) | norm(
            f"encoder.layers.{i}.layer_norm2", width
        )
        made |= linear(f"encoder.layers.{i}.mlp.fc1", 4 * width, width)
        made |= linear(f"encoder.layers.{i}.mlp.fc2", width, 4 * width)
    return made | norm("final_layer_norm", width)


def tiny_autoencoder(channels: int) -> Shapes:
    """The host's TAESD; blocks have three convolutions of 64 channels."""
    made: Shapes = {}
    encoder = ["3", "b", "s", "b", "b", "b", "s", "b", "b", "b", "s", "b", "b", "b", "z"]
    decoder = ["", "z", "", "b", "b", "b", "", "s", "b", "b", "b", "", "s", "b", "b", "b", "", "s", "b", "3"]
    for side, parts in (("taesd_encoder", encoder), ("taesd_decoder", decoder)):
        for i, part in enumerate(parts):
            made |= _autoencoder_part(f"{side}.{i}", part, channels, inward=side == "taesd_encoder")
    return made


def _autoencoder_part(name: str, part: str, channels: int, inward: bool) -> Shapes:
    if part == "b":
        blocks = [conv(f"{name}.conv.{j}", 64, 64) for j in (0, 2, 4)]
        return blocks[0] | blocks[1] | blocks[2]
    if part == "s":
        return conv(name, 64, 64, bias=False)
    if part == "3":
        return conv(name, 64, 3) if inward else conv(name, 3, 64)
    if part == "z":
        return conv(name, channels, 64) if inward else conv(name, 64, channels)
    return {}


def views(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Weights of variance 1 / fan-in, norms around 1, biases around 0: views of one vector per kind."""
    longest: dict[str | int, int] = {}
    for name, shape in shapes.items():
        kind = _kind(name, shape)
        longest[kind] = max(longest.get(kind, 0), _extent(shape))
    generator = torch.Generator().manual_seed(seed)
    vectors = {}
    for kind, length in longest.items():
        noise = torch.randn(length, generator=generator)
        vectors[kind] = (
            0.1 * noise + (kind == "norm") if isinstance(kind, str) else noise * kind**-0.5
        ).half()
    return {
        name: vectors[_kind(name, shape)].as_strided(shape, STRIDES[: len(shape)])
        for name, shape in shapes.items()
    }


def _kind(name: str, shape: Shape) -> str | int:
    """The fan-in of a matrix or kernel; what a vector is."""
    if len(shape) > 1:
        return math.prod(shape[1:])
    return "norm" if name.endswith("weight") else "bias"


def _extent(shape: Shape) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, STRIDES, strict=False))


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def sd1() -> dict[str, Tensor]:
    shapes = prefixed("model.diffusion_model.", unet())
    shapes |= prefixed("first_stage_model.", tiny_autoencoder(4))
    shapes |= prefixed("cond_stage_model.transformer.text_model.", clip_l())
    return views(shapes, 1)


def sd3() -> dict[str, Tensor]:
    shapes = prefixed("model.diffusion_model.", mmdit())
    shapes |= prefixed("first_stage_model.", tiny_autoencoder(16))
    shapes |= prefixed("text_encoders.clip_l.transformer.text_model.", clip_l())
    shapes["text_encoders.clip_l.transformer.text_projection.weight"] = (768, 768)
    return views(shapes, 3)


def write(weights: dict[str, Tensor], path: Path) -> None:
    """As the old checkpoints are: a pickle of tensors, which stores shared memory once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": weights}, path)
