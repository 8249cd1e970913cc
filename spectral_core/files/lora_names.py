"""The names of LoRA files: which tensor is which half of which module, and what a module is called here.

kohya's, diffusers' (present and old), PEFT's and ComfyUI's native spellings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import SpectralAdapterError
from ..names import spellings as keys
from ..names.layer_name import LayerName
from ..names.unet_blocks import ATTENTION, RESNET, TRANSFORMER, UNetLayout, inverse_unet_table, unet_table
from . import lycoris
from .lora_alphas import PEFT_PREFIX

_ROLES = re.compile(
    r"(?P<module>.+?)\.(?:processor\.)?(?:"
    r"(?P<old>to_q|to_k|to_v|to_out)_lora\.(?P<c>up|down)\.weight"
    r"|lora_(?P<a>up|down|mid|A|B)(?:\.(?!weight)\w+)?\.weight"
    r"|(?:lora|lora_linear_layer)\.(?P<b>up|down)\.weight"
    rf"|(?P<lycoris>{'|'.join(lycoris.ROLES)})"
    r"|(?P<alpha>alpha))"
)
_ROLE_OF = {"A": "down", "B": "up"}


def role_of(tensor: str) -> tuple[str, str] | None:
    """(module's name, what the tensor is of it: up, down, mid, alpha or one of :data:`.lycoris.ROLES`); None
    for a tensor that plays no role.
    """
    match = _ROLES.fullmatch(tensor)
    if match is None:
        return None
    role = match["a"] or match["b"] or match["c"] or match["lycoris"] or "alpha"
    module = match["module"]
    if match["old"]:
        module = f"{module}.{_old_name(module, match['old'])}"
    return module, _ROLE_OF.get(role, role)


def _old_name(module: str, weight: str) -> str:
    """The module that diffusers' old attention processors meant by ``to_q_lora`` …, in UNets and text
    encoders.
    """
    if module.endswith("self_attn"):
        return {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}[weight]
    return "to_out.0" if weight == "to_out" else weight


_UNET_STARTS = (
    "down_blocks.",
    "up_blocks.",
    "mid_block.",
    "conv_in",
    "conv_out",
    "time_embedding.",
    "add_embedding.",
)
_TEXT_ENCODERS = {  # ComfyUI's prefixes of generic LoRA files; clip_g is SDXL's second
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.clip_h.transformer.": "text_encoder.",
    "text_encoders.clip_g.transformer.": "text_encoder_2.",
    "clip_l.transformer.": "text_encoder.",
    "clip_h.transformer.": "text_encoder.",
    "clip_g.transformer.": "text_encoder_2.",
}


def by_block_numbers(layers: Iterable[str], layout: UNetLayout) -> dict[str, str]:
    """Layer -> its name in a kohya file by the model's own block numbers, of a UNet that is not built like
    Stable Diffusion; empty for one that is.

    diffusers' words for such blocks would be read as those of SD 1.5, which may have layers of the same
    shape there. Raises SpectralAdapterError for a layer that the layout has not.
    """
    if layout in (UNetLayout.sd1(), UNetLayout.sdxl()):
        return {}
    table, found = unet_table(layout), {}
    for name in layers:
        layer = LayerName.parse(name)
        if layer.part != "unet":
            continue
        native = table.get(layer.vector[0] if layer.vector else layer.path)
        if native is None:
            raise SpectralAdapterError(
                f"layer {name}: the model has no such block, so that there is no name by its block numbers: "
                "give the adapter's own model, or take diffusers' names"
            )
        module = name.rpartition(".")[0] if layer.vector else name
        found[module] = "lora_unet_" + native.replace(".", "_")
    return found


_BLOCK = re.compile(
    r"(?:lora_unet_|(?:base_model\.model\.)?diffusion_model\.)"
    r"(?P<path>(?:(?:in|out)put_blocks[._]\d+|middle_block)[._]\d+[._]"
    r"(?:transformer_blocks[._]\d+[._])?(?P<leaf>.+))"
)
_BLOCK_LEAVES = {
    leaf.replace(".", "_") for leaf in (*RESNET.values(), *ATTENTION, *TRANSFORMER, "op", "conv")
}


def layout_of(modules: Iterable[str]) -> UNetLayout:
    """Whose numbers of blocks a file's modules have: SDXL's or SD 1's, whichever has all of them; a layout
    without blocks where neither has, so that such names stay as they are.

    The same number is another block in a smaller UNet, whose updates may fit there by their shape.
    """
    found = (match for module in modules if (match := _BLOCK.fullmatch(module)))
    paths = [m["path"].replace(".", "_") for m in found if m["leaf"].replace(".", "_") in _BLOCK_LEAVES]
    for layout in (UNetLayout.sdxl(), UNetLayout.sd1()):
        known = inverse_unet_table(layout, True)
        if all(path in known for path in paths):
            return layout
    return UNetLayout((), None, ())


# what ComfyUI knows of a CLIP text encoder by kohya's names too; its other layers by their own alone
_OF_KOHYA = re.compile(r"text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12])")
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)$")


def layer_name(module: str, unet: UNetLayout | None = None) -> str:
    """This project's name for a module as LoRA files spell it; in the part ``kohya`` where only a host can
    tell. unet: whose numbers of blocks native names have, by default SDXL's.
    """
    if module.startswith(("lora_", "lycoris_")) and "." not in module:
        return keys.from_kohya(module, unet) or f"{keys.KOHYA_PART}.{module}"
    if match := _PROCESSOR.search(module):
        module = module.removesuffix(match[0]) + "." + _old_name(module, match[1])
    path = module.removeprefix(PEFT_PREFIX)
    for prefix, part in _TEXT_ENCODERS.items():
        inner = keys.canonical_path(path.removeprefix(prefix))
        if path.startswith(prefix) and _OF_KOHYA.fullmatch(inner):
            return part + inner
    if path.startswith(keys.NATIVE_PART + "."):
        return keys.from_native(path, keys.ModelLayout.sd1(unet or UNetLayout.sdxl())) or path
    if path.startswith(_UNET_STARTS):
        return f"unet.{path}"
    canonical = keys.canonical_path(path)
    if canonical.startswith("text_model."):
        return f"text_encoder.{canonical}"
    part, dot, rest = path.partition(".")
    if dot and part.startswith("text_encoder"):
        return f"{part}.{keys.canonical_path(rest)}"
    if "." not in module:
        return f"{keys.BARE_PART}.{module}"
    return module  # PEFT's prefix is a part of the names that hosts' maps have
