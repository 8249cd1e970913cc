"""Layer names: this project's (diffusers) ↔ ComfyUI's native ↔ kohya's, for SD 1.x, 2.x, SDXL and UNets built
like them.

A layer's name here is ``<part>.<path>`` with diffusers' module path. The native names number the same blocks
in one row (``input_blocks.n``), so the map follows from the block structure alone (:class:`UNetLayout`); a
kohya name is the path with ``_`` for every dot, which a small grammar of the known words takes apart again.
Hosts have their own maps for every other model: there, a layer keeps the host's native weight name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import SpectralAdapterError
from .layer_name import LayerName
from .unet_blocks import ATTENTION, ENDS, RESNET, TRANSFORMER, UNetLayout, inverse_unet_table, unet_table

_CLIP = (
    *(f"self_attn.{weight}" for weight in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
)
_CLIP_ENDS = (
    "text_model.embeddings.token_embedding",
    "text_model.embeddings.position_embedding",
    "text_model.final_layer_norm",
    "text_projection",
)
NATIVE_PART = "diffusion_model"
BARE_PART = "model"  # holds modules of a file whose names have no dot
KOHYA_PART = "kohya"  # holds kohya names that cannot be told, as they are


@dataclass(frozen=True)
class ModelLayout:
    """A model's UNet layout and, per text encoder part, ComfyUI's prefix of its weights."""

    family: str
    unet: UNetLayout
    clips: tuple[tuple[str, str], ...]

    @classmethod
    def sd1(cls, unet: UNetLayout | None = None) -> ModelLayout:
        """SD 1.x; with another ``unet`` any model with one CLIP-L, such as a miniature."""
        return cls("sd1", unet or UNetLayout.sd1(), (("text_encoder", "clip_l.transformer."),))

    @classmethod
    def sd2(cls) -> ModelLayout:
        return cls("sd2", UNetLayout.sd2(), (("text_encoder", "clip_h.transformer."),))

    @classmethod
    def sdxl(cls) -> ModelLayout:
        clips = (("text_encoder", "clip_l.transformer."), ("text_encoder_2", "clip_g.transformer."))
        return cls("sdxl", UNetLayout.sdxl(), clips)


LAYOUTS: dict[str, Callable[[], ModelLayout]] = {
    "sd1": ModelLayout.sd1,
    "sd2": ModelLayout.sd2,
    "sdxl": ModelLayout.sdxl,
}


def canonical_path(path: str) -> str:
    """A text encoder's module path with its ``text_model.`` level, which CLIPTextModel has lost in
    transformers 5.

    Every other path is returned as it is. Names in files and adapters are always canonical.
    """
    bare = path.startswith(("encoder.layers.", "embeddings.token_embedding", "embeddings.position_embedding"))
    return f"text_model.{path}" if bare or path == "final_layer_norm" else path


def path_spellings(path: str) -> tuple[str, ...]:
    """The module paths to try for a layer's path, in this order: as it is, with ``text_model.``, without."""
    return tuple(dict.fromkeys((path, canonical_path(path), path.removeprefix("text_model."))))


def to_native(name: str, layout: ModelLayout) -> tuple[str, tuple[int, int] | None]:
    """ComfyUI's weight key of a layer, and the rows of it that the layer is (None: all).

    Names of other parts are native already. Raises SpectralAdapterError for a layer that the layout does not
    have.
    """
    layer = LayerName.parse(name)
    for part, prefix in layout.clips:
        if layer.part == part:
            return f"{prefix}{canonical_path(layer.path)}.weight", layer.rows
    if layer.part != "unet":
        return f"{layer.part}.{layer.path}.weight", layer.rows
    native = unet_table(layout.unet).get(layer.path)
    if native is None:
        raise SpectralAdapterError(
            f"layer {name}: a {layout.family} UNet of this layout has no such module; expected names such as "
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q. Is it for another model?"
        )
    return f"{NATIVE_PART}.{native}.weight", layer.rows


def from_native(key: str, layout: ModelLayout) -> str | None:
    """The layer's name of a ComfyUI weight key, with or without ``.weight``; None where there is none."""
    path = key.removesuffix(".weight")
    for part, prefix in layout.clips:
        if path.startswith(prefix):
            return f"{part}.{path.removeprefix(prefix)}"
    if path.startswith(NATIVE_PART + "."):
        ours = inverse_unet_table(layout.unet, False).get(path.removeprefix(NATIVE_PART + "."))
        return None if ours is None else f"unet.{ours}"
    return None


def _words(leaves: tuple[str, ...]) -> dict[str, str]:
    return {leaf.replace(".", "_"): leaf for leaf in leaves}


_BLOCKS = re.compile(
    r"(?:(down|up)_blocks_(\d+)|mid_block)_(attentions|resnets|downsamplers|upsamplers)_(\d+)_(.+)"
)
_TRANSFORMER_BLOCK = re.compile(r"transformer_blocks_(\d+)_(.+)")
_CLIP_LAYER = re.compile(r"text_model_encoder_layers_(\d+)_(.+)")
_LEAVES = {
    "attentions": _words(ATTENTION),
    "resnets": _words(tuple(RESNET)),
    "downsamplers": {"conv": "conv"},
    "upsamplers": {"conv": "conv"},
}
_TRANSFORMER_WORDS = _words(TRANSFORMER)
_CLIP_WORDS = _words(_CLIP)
_END_WORDS = _words(
    (
        *ENDS,
        *_CLIP_ENDS,
        *(f"{label}.linear_{i}" for label in ("add_embedding", "class_embedding") for i in (1, 2)),
    )
)


def unflatten(flat: str) -> str | None:
    """The module path whose dots became ``_``: of the UNets and CLIP text encoders here; None for any other
    word.
    """
    if flat in _END_WORDS:
        return _END_WORDS[flat]
    if match := _CLIP_LAYER.fullmatch(flat):
        leaf = _CLIP_WORDS.get(match[2])
        return leaf and f"text_model.encoder.layers.{match[1]}.{leaf}"
    match = _BLOCKS.fullmatch(flat)
    if match is None:
        return None
    side, level, kind, index, rest = match.groups()
    block = f"{side}_blocks.{level}" if side else "mid_block"
    inner = _TRANSFORMER_BLOCK.fullmatch(rest) if kind == "attentions" else None
    if inner:
        leaf = _TRANSFORMER_WORDS.get(inner[2])
        return leaf and f"{block}.{kind}.{index}.transformer_blocks.{inner[1]}.{leaf}"
    leaf = _LEAVES[kind].get(rest)
    return leaf and f"{block}.{kind}.{index}.{leaf}"


def has_two_encoders(names: list[str], family: str = "") -> bool:
    """Whether the layers are of SDXL, whose text encoders kohya calls te1 and te2; told by family, parts and
    depth.
    """
    deeper = any(re.search(r"^unet\..*attentions\.\d+\.transformer_blocks\.[1-9]", name) for name in names)
    return family == "sdxl" or deeper or any(name.startswith("text_encoder_2.") for name in names)


def to_kohya(name: str, two_encoders: bool) -> str:
    """kohya's name of a layer, without dots: ``lora_unet_…``, ``lora_te_…`` or, for SDXL,
    ``lora_te1_…``/``lora_te2_…``.

    A part ``kohya`` holds names that came from a kohya file as they are. Raises for rows of a fused weight,
    and for parts that kohya has no prefix for.
    """
    layer = LayerName.parse(name)
    if layer.rows is not None:
        raise SpectralAdapterError(
            f"layer {name}: kohya names mean whole weights, this layer is some rows of a fused one; "
            "connect the model to Export Adapter as LoRA, whose own names are then used, or save it in this "
            "project's own format"
        )
    if layer.part == KOHYA_PART:
        return layer.path
    prefixes = {
        "unet": "lora_unet_",
        NATIVE_PART: "lora_unet_",
        "text_encoder": "lora_te1_" if two_encoders else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    if layer.part not in prefixes:
        raise SpectralAdapterError(
            f"layer {name}: kohya has no prefix for part {layer.part!r}, only for {', '.join(prefixes)}"
        )
    path = canonical_path(layer.path) if layer.part.startswith("text_encoder") else layer.path
    if path == "text_projection":  # which readers know with a number alone
        prefixes["text_encoder"] = "lora_te1_"
    return prefixes[layer.part] + path.replace(".", "_")


def in_lora_file(name: str, two_encoders: bool) -> str:
    """A layer's name in a LoRA file of kohya's kind: kohya's where every reader knows it, of a UNet and of
    CLIP text encoders; any other keeps its dots.

    A name without dots is not told apart again, and ``diffusion_model.…`` may be a host's weight or an alias
    that only its map knows; with its dots a reader of the file that it came from knows it in either case.
    Raises as :func:`to_kohya` does.
    """
    layer = LayerName.parse(name)
    if layer.part == BARE_PART and "." not in layer.path:
        return layer.path
    if layer.rows is not None or has_kohya_name(layer):
        return to_kohya(name, two_encoders)
    return name


def has_kohya_name(layer: LayerName) -> bool:
    """Whether kohya's name of the layer is one that readers know, whichever model it is for."""
    if layer.part == "unet":
        return not layer.path.startswith("base_model.")  # PEFT's, which hosts' maps know with it
    if layer.part in ("text_encoder", "text_encoder_2"):
        return canonical_path(layer.path).startswith("text_")
    return layer.part == KOHYA_PART


_KOHYA = re.compile(r"lora_(unet|te1?|te2)_(.+)")
_KOHYA_PARTS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}


def from_kohya(key: str, unet: UNetLayout | None = None) -> str | None:
    """The layer's name of a kohya name (the key before its first dot); None where it cannot be told.

    Both spellings of UNet blocks are read: diffusers' (sd-scripts for SD 1.x and 2.x) from their words alone,
    native ones (sd-scripts for SDXL) by ``unet``, SDXL's layout unless another is given.
    """
    match = _KOHYA.fullmatch(key)
    if match is None:
        return None
    part, flat = _KOHYA_PARTS[match[1]], match[2]
    path = unflatten(flat)
    if path is not None and path.startswith("text_") == (part != "unet"):
        return f"{part}.{path}"
    ours = inverse_unet_table(unet or UNetLayout.sdxl(), True).get(flat) if part == "unet" else None
    return ours and f"unet.{ours}"
