"""The block structure of Stable Diffusion's UNets, and the map of module names that follows from it.

diffusers numbers blocks by level (``down_blocks.1.attentions.0``), the original code and ComfyUI in one row
(``input_blocks.4.1``); what is inside a block has nearly the same names in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from ..errors import SpectralAdapterError

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = ("norm", "proj_in", "proj_out")
_ATTENTION_WEIGHTS = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER = (
    *(f"attn{i}.{weight}" for i in (1, 2) for weight in _ATTENTION_WEIGHTS),
    *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
)
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


_SIDE = re.compile(r"(down|up)_blocks\.(\d+)\.|mid_block\.")


def halvings(names: Iterable[str]) -> dict[str, int]:
    """Layer name -> how often the picture was halved before it, of the layers of a UNet's blocks.

    >>> halvings(["unet.down_blocks.0.a", "unet.mid_block.a", "unet.up_blocks.2.a", "te.layers.0"])
    {'unet.down_blocks.0.a': 0, 'unet.mid_block.a': 2, 'unet.up_blocks.2.a': 0}
    """
    found = {name: match for name in names if (match := _SIDE.search(name))}
    deepest = max((int(match[2]) for match in found.values() if match[2]), default=0)
    return {
        name: int(match[2]) if match[1] == "down" else deepest - int(match[2] or 0)
        for name, match in found.items()
    }


@dataclass(frozen=True)
class UNetLayout:
    """Blocks of a UNet: per level, the transformer depth behind each of its residual blocks (0: none).

    ``down[i]`` has one entry per residual block of down block i, ``up[i]`` one more. ``mid`` is the depth in
    the middle, 0 a residual block alone, None no middle. ``label`` names the module behind the native
    ``label_emb``.
    """

    down: tuple[tuple[int, ...], ...]
    mid: int | None
    up: tuple[tuple[int, ...], ...]
    label: str = ""

    @classmethod
    def symmetric(cls, depths: tuple[int, ...], layers: int = 2, label: str = "") -> UNetLayout:
        """``depths`` per level, finest first; the way up mirrors them, the middle has the last one (or 1)."""
        down = tuple((depth,) * layers for depth in depths)
        up = tuple((depth,) * (layers + 1) for depth in reversed(depths))
        return cls(down, max(depths[-1], 1), up, label)

    @classmethod
    def sd1(cls) -> UNetLayout:
        return cls.symmetric((1, 1, 1, 0))

    @classmethod
    def sd2(cls) -> UNetLayout:
        return cls.symmetric((1, 1, 1, 0))

    @classmethod
    def sdxl(cls) -> UNetLayout:
        return cls.symmetric((0, 2, 10), label="add_embedding")

    @classmethod
    def mini(cls) -> UNetLayout:
        """The embedded model's."""
        return cls(((0,), (1,), (0,)), 1, ((0, 0), (1, 1), (0, 0)))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNetLayout:
        """From a diffusers UNet2DConditionModel configuration (its ``config.json`` as a dictionary).

        Raises SpectralAdapterError for block types that the Stable Diffusion UNets do not have.
        """
        types = tuple(config["down_block_types"])
        counts = _per_level(config.get("layers_per_block", 2), len(types))
        depths = _per_level(config.get("transformer_layers_per_block", 1), len(types))
        up_depths = config.get("reverse_transformer_layers_per_block") or tuple(reversed(depths))
        down = tuple(_depths(*level) for level in zip(types, counts, depths, strict=True))
        ups = zip(tuple(config["up_block_types"]), [n + 1 for n in reversed(counts)], up_depths, strict=True)
        return cls(down, _mid_depth(config, depths), tuple(_depths(*level) for level in ups), _label(config))

    @classmethod
    def from_native(cls, paths: Iterable[str]) -> UNetLayout:
        """From the module paths of a UNet with the original code's block names (``input_blocks.1.0…``).

        The module behind ``label_emb`` is taken for SDXL's. Raises SpectralAdapterError where there are no
        such blocks.
        """
        own = {path: re.match(r"(input|output|middle)_blocks?\.(\d+)\.?(.*)", path) for path in paths}
        rows: dict[str, dict[int, list[str]]] = {"input": {}, "output": {}, "middle": {}}
        for match in filter(None, own.values()):
            rows[match[1]].setdefault(int(match[2]), []).append(match[3])
        if not rows["input"] or not rows["output"]:
            raise SpectralAdapterError(
                "this model has no input_blocks and output_blocks: it is no UNet of Stable Diffusion's kind"
            )
        down = _levels(rows["input"], 1, lambda inner: inner == "0.op", True)
        up = _levels(rows["output"], 0, lambda inner: re.fullmatch(r"\d\.conv", inner) is not None, False)
        middle = rows["middle"]
        mid = _depth_in(middle[1], "") if 1 in middle else (0 if middle else None)
        return cls(down, mid, up, "add_embedding" if any(p.startswith("label_emb.") for p in own) else "")


def _depth_in(inner: list[str], before: str) -> int:
    """How many transformer blocks there are below ``before``."""
    pattern = re.compile(re.escape(before) + r"transformer_blocks\.(\d+)")
    return len({match[1] for path in inner if (match := pattern.match(path))})


def _levels(
    row: Mapping[int, list[str]], first: int, ends: Callable[[str], bool], apart: bool
) -> tuple[tuple[int, ...], ...]:
    """The depths of a row of blocks, cut into levels behind those that change the resolution.

    apart: a block that does so is one of its own, as on the way down.
    """
    levels: list[list[int]] = [[]]
    for number in sorted(n for n in row if n >= first):
        is_end = any(ends(inner) for inner in row[number])
        if not (is_end and apart):
            levels[-1].append(_depth_in(row[number], "1."))
        if is_end:
            levels.append([])
    return tuple(tuple(level) for level in levels)


def _per_level(value: Any, levels: int) -> tuple[Any, ...]:
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels:
        raise SpectralAdapterError(
            f"UNet configuration: found {len(values)} entries for {levels} levels: {values}"
        )
    return values


def _depths(block_type: str, count: int, depth: Any) -> tuple[int, ...]:
    """Transformer depth behind each residual block of one level."""
    if block_type in ("DownBlock2D", "UpBlock2D"):
        return (0,) * count
    if block_type not in ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"):
        raise SpectralAdapterError(
            f"UNet block type {block_type}: expected CrossAttn…Block2D or …Block2D, as in Stable Diffusion; "
            "for other models use the host's own weight names"
        )
    return _per_level(depth, count)


def _mid_depth(config: Mapping[str, Any], depths: tuple[Any, ...]) -> int | None:
    kind = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if kind is None:
        return None
    if kind == "UNetMidBlock2D":
        return 0
    last = depths[-1]
    return int(last if isinstance(last, int) else last[-1])


def _label(config: Mapping[str, Any]) -> str:
    if config.get("addition_embed_type") == "text_time":
        return "add_embedding"
    return "class_embedding" if config.get("class_embed_type") == "projection" else ""


def _resnet(ours: str, native: str) -> dict[str, str]:
    return {f"{ours}.{a}": f"{native}.{b}" for a, b in RESNET.items()}


def _attention(ours: str, native: str, depth: int) -> dict[str, str]:
    leaves = (*ATTENTION, *(f"transformer_blocks.{k}.{leaf}" for k in range(depth) for leaf in TRANSFORMER))
    return {f"{ours}.{leaf}": f"{native}.{leaf}" for leaf in leaves}


@lru_cache(maxsize=32)
def unet_table(layout: UNetLayout) -> Mapping[str, str]:
    """Module path in diffusers -> native module path, for every module with a weight (a few that a model may
    lack).
    """
    table = dict(ENDS)
    if layout.label:
        table |= {f"{layout.label}.linear_{i}": f"label_emb.0.{j}" for i, j in ((1, 0), (2, 2))}
    n = 1
    for i, depths in enumerate(layout.down):
        for j, depth in enumerate(depths):
            table |= _resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0")
            if depth:
                table |= _attention(f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1", depth)
            n += 1
        if i < len(layout.down) - 1:
            table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    if layout.mid is not None:
        table |= _resnet("mid_block.resnets.0", "middle_block.0")
    if layout.mid:
        table |= _attention("mid_block.attentions.0", "middle_block.1", layout.mid)
        table |= _resnet("mid_block.resnets.1", "middle_block.2")
    n = 0
    for i, depths in enumerate(layout.up):
        for j, depth in enumerate(depths):
            table |= _resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0")
            if depth:
                table |= _attention(f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1", depth)
            if j == len(depths) - 1 and i < len(layout.up) - 1:
                table[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n}.{2 if depth else 1}.conv"
            n += 1
    return MappingProxyType(table)


@lru_cache(maxsize=32)
def inverse_unet_table(layout: UNetLayout, flat: bool) -> Mapping[str, str]:
    """Native module path -> diffusers' path; ``flat`` with every dot of the native path as ``_``."""
    table = unet_table(layout)
    inverse = {native.replace(".", "_") if flat else native: ours for ours, native in table.items()}
    assert len(inverse) == len(table), "native names of a layout must not collide"
    return MappingProxyType(inverse)
