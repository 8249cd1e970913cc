"""Import of LoRA files: kohya's names, diffusers' (present and old), PEFT's, and ComfyUI's native ones.

Every tensor of a file is accounted for: it belongs to a layer, or it is reported, or the file is refused.
LoHa, LoKr and full differences become factors without a loss (:mod:`.lycoris`); kinds that change the weight
they find (DoRA, OFT, …) are refused by name, as they need the model. A CP-decomposed convolution
(``lora_mid``) is multiplied out, which is exact: downₚ = Σ_q midₚq · down_q.

Shapes: down (r, in, *kernel), up (out, r, *1), mid (r, r, *kernel), alpha a single number.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter, AdapterLayer, Provenance, Term
from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape
from ..methods import LoRAConfig
from ..names import spellings as keys
from ..names.layer_name import LayerName
from ..names.unet_blocks import UNetLayout
from ..words import OneLine
from . import adapter_file as fileformat
from . import lycoris
from . import metadata as file_metadata
from . import other_kinds as foreign
from .container import open_safely
from .lora_alphas import PEFT_PREFIX, AlphaOf, alphas_beside, alphas_in_metadata

MOST_MULTIPLIED = 96 << 20  # bytes that ``lora_mid`` may become, all layers together

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FLOATS_8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # every value of these is one of float16, too
_ROLES = re.compile(
    r"(?P<module>.+?)\.(?:processor\.)?(?:"
    r"(?P<old>to_q|to_k|to_v|to_out)_lora\.(?P<c>up|down)\.weight"
    r"|lora_(?P<a>up|down|mid|A|B)(?:\.(?!weight)\w+)?\.weight"
    r"|(?:lora|lora_linear_layer)\.(?P<b>up|down)\.weight"
    rf"|(?P<lycoris>{'|'.join(lycoris.ROLES)})"
    r"|(?P<alpha>alpha))"
)
_ROLE_OF = {"A": "down", "B": "up"}
_DEPENDENT = re.compile(r"(.+?)\.(?:dora_scale|oft_blocks|a1\.weight)")
_READ_KINDS = ("LoHa", "LoKr", "full difference")  # :mod:`.lycoris`
_BUNDLED = "bundle_emb."  # a trained word that lies in a LoRA file


@dataclass(frozen=True, repr=False)
class ImportedLoRA(OneLine):
    """A LoRA file as an adapter.

    unmatched: tensors that belong to no layer. raw_layers: layers whose names need the host's own map; they
    keep the file's name in the part ``kohya`` and match no module before they are renamed. notes: what was
    assumed. sources: layer -> its module's name in the file, by which a host's own map may know it.
    dependent: the tensors of layers that change the weight they find (DoRA, OFT, …), which need the model.
    """

    adapter: Adapter
    unmatched: tuple[str, ...] = ()
    raw_layers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    dependent: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass
class _Layer:
    """The tensors of one layer while they are collected; ``source`` is their name in the file."""

    source: str
    tensors: dict[str, str] = field(default_factory=dict)


def import_lora(path: str | os.PathLike[str], unet: UNetLayout | None = None) -> Adapter:
    """A LoRA file as an adapter; what did not match is kept in ``provenance.training``. See
    :func:`read_lora`.

    >>> import torch, spectral_core as sc
    >>> from safetensors.torch import save_file
    >>> name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    >>> halves = {f"{name}.lora_A.weight": torch.randn(2, 6), f"{name}.lora_B.weight": torch.randn(8, 2)}
    >>> save_file(halves, "lora.safetensors")
    >>> list(sc.import_lora("lora.safetensors").layers) == [name]
    True
    """
    return read_lora(path, unet).adapter


def read_lora(
    path: str | os.PathLike[str], unet: UNetLayout | None = None, *, with_dependent: bool = False
) -> ImportedLoRA:
    """A LoRA file as an adapter, with everything that was assumed or did not match.

    unet: layout for native block names (``lora_unet_input_blocks_…``), SDXL's by default. Changed biases and
    norms are no matrices: they are left out, and the notes say so. PEFT files take alpha and ranks from the
    ``adapter_config.json`` beside them. with_dependent: hand out layers that need the model's weights instead
    of refusing the file. Raises SpectralAdapterError, with file and layer, for other kinds of
    adapters, halves without their partner, shapes that do not fit, and values that are not finite.
    """
    file = open_safely(path)
    if fileformat.VERSION_KEY in file.metadata:
        raise SpectralAdapterError(
            f"{file.path}: is an adapter of this project, not a LoRA file: load it with load()"
        )
    source = _Source(
        str(file.path),
        file.path.name,
        {key: entry.shape for key, entry in file.entries.items()},
        file.read,
        file.metadata,
        # looked for only once the names are known to be a LoRA's
        lambda: alphas_in_metadata(file.metadata, file.path) or alphas_beside(file.path, file.entries),
    )
    return _read(source, lambda module: layer_name(module, unet), with_dependent)


def lora_from_tensors(
    tensors: Mapping[str, Tensor], name: str = "LoRA", *, keep_names: bool = False
) -> ImportedLoRA:
    """A LoRA that is already in memory, such as ComfyUI's ``LORA_MODEL``, as an adapter that shares nothing
    with it.

    Changed biases and norms are left out and reported. keep_names: leave native names as they are, which is
    right for every model, instead of reading them as those of a Stable Diffusion. Raises as
    :func:`read_lora` does.
    """

    def copies(keys: list[str]) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return {key: tensors[key].detach().cpu().clone() for key in keys}

    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    source = _Source(name, name, shapes, copies, {}, lambda: None)
    return _read(source, str if keep_names else layer_name, False)


@dataclass(frozen=True)
class _Source:
    """Where a LoRA's tensors are: names with shapes, a reader, and the alphas kept elsewhere.

    ``place`` starts messages.
    """

    place: str
    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[list[str]], dict[str, Tensor]]
    metadata: Mapping[str, str]
    alphas: Callable[[], AlphaOf | None]


def _read(source: _Source, name_of: Callable[[str], str], with_dependent: bool) -> ImportedLoRA:
    dropped = [key for key in source.shapes if _is_difference(key, source.shapes[key])]
    left_out = set(dropped)
    kept = [key for key in source.shapes if key not in left_out]
    modules = {m[1] for key in kept if (m := _DEPENDENT.fullmatch(key))} if with_dependent else set()
    apart = [key for key in kept if _module_of(key, modules)]
    left_out = set(apart)
    kept = [key for key in kept if key not in left_out]
    for key in kept:
        if (kind := foreign.adapter_kind(key)) and kind not in _READ_KINDS:
            raise SpectralAdapterError(
                f"{source.place}: tensor {key!r} belongs to a {kind} adapter; expected LoRA, LoHa, LoKr or "
                "full differences. Convert it with the tool that made it, or use the host's own loader"
            )
    try:
        collected, unmatched = _collect(kept, name_of)
    except SpectralAdapterError as error:
        raise SpectralAdapterError(f"{source.place}: {error}") from error
    if not apart and not any(set(layer.tensors) - {"alpha"} for layer in collected.values()):
        raise SpectralAdapterError(f"{source.place}: is {foreign.family(kept)}; expected a LoRA file")
    notes = [_dropped(source.read(dropped))] if dropped else []
    alpha_of = source.alphas()
    if alpha_of is None and any(key.startswith(PEFT_PREFIX) for key in kept):
        notes.append("no adapter_config.json beside the file: alpha taken as the rank of each layer")
    tensors = source.read([key for layer in collected.values() for key in layer.tensors.values()])
    _refuse_large_products(source, collected.values())
    layers = {}
    for name, layer in collected.items():
        parts = {role: tensors[key] for role, key in layer.tensors.items()}
        layers[name] = _build(f"{source.place}: layer {layer.source}", layer.source, parts, alpha_of)
    raw = tuple(name for name in layers if name.startswith(keys.KOHYA_PART + "."))
    if raw:
        notes.append(
            f"{len(raw)} layers have names that need the model's own map (such as {raw[0]}); they are kept "
            f"under the file's names in the part {keys.KOHYA_PART!r}"
        )
    if words := sorted({key.split(".")[1] for key in unmatched if key.startswith(_BUNDLED)}):
        notes.append(f"the file holds the trained words {', '.join(words)}, which were left out")
    adapter = Adapter(layers, _provenance(source.name, source.metadata, layers, unmatched, raw))
    sources = {name: layer.source for name, layer in collected.items()}
    dependent: dict[str, dict[str, Tensor]] = {}
    for key, value in source.read(apart).items():
        dependent.setdefault(_module_of(key, modules), {})[key] = value
    return ImportedLoRA(adapter, unmatched, raw, tuple(notes), sources, dependent)


def _module_of(key: str, modules: set[str]) -> str:
    """Which of the modules the tensor belongs to; empty for none."""
    parts = key.split(".")
    starts = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((start for start in starts if start in modules), "")


def layer_of_difference(place: str, difference: Tensor) -> AdapterLayer:
    """A weight's whole difference (out, in, *kernel) as a layer. Raises SpectralAdapterError, beginning with
    ``place``, where it is none."""
    if not _is_finite(difference):
        raise SpectralAdapterError(f"{place}: its update has values that are not finite numbers")
    down, up, _ = lycoris.factors(place, {"diff": difference}, None)
    return _layer(down, up, None)


def _refuse_large_products(source: _Source, layers: Iterable[_Layer]) -> None:
    """Before any is computed: a small file may ask for products of any size."""
    total = 0
    for layer in layers:
        down, mid = (source.shapes.get(layer.tensors.get(role, ""), ()) for role in ("down", "mid"))
        total += math.prod(mid) // max(mid[1], 1) * down[1] * 4 if len(mid) > 1 and len(down) > 1 else 0
        if total > MOST_MULTIPLIED:
            raise SpectralAdapterError(
                f"{source.place}: layer {layer.source}: multiplying out lora_mid takes more than "
                f"{MOST_MULTIPLIED >> 20} MiB for the whole file: save the LoRA without CP decomposition"
            )


def _is_difference(key: str, shape: tuple[int, ...]) -> bool:
    return key.endswith((".diff_b", ".w_norm", ".b_norm")) or (key.endswith(".diff") and len(shape) == 1)


def _dropped(differences: Mapping[str, Tensor]) -> str:
    changed = sum(bool(value.any()) for value in differences.values())
    return (
        f"{len(differences)} changed biases and norms are no part of an adapter and were left out; "
        f"{changed} of them are not zero"
    )


def _collect(
    names: Iterable[str], name_of: Callable[[str], str]
) -> tuple[dict[str, _Layer], tuple[str, ...]]:
    """Layer name -> its tensors by role (up, down, mid, alpha); and the names that play no role."""
    found: dict[str, _Layer] = {}
    unmatched = []
    for key in names:
        match = _ROLES.fullmatch(key)
        if match is None:
            unmatched.append(key)
            continue
        role = match["a"] or match["b"] or match["c"] or match["lycoris"] or "alpha"
        role = _ROLE_OF.get(role, role)
        module = match["module"]
        if match["old"]:
            module = f"{module}.{_old_name(module, match['old'])}"
        name = str(LayerName.parse(name_of(module)))
        layer = found.setdefault(name, _Layer(module))
        if role in layer.tensors:
            raise SpectralAdapterError(
                f"tensors {layer.tensors[role]!r} and {key!r} are both the {role} projection of {name}: the "
                "file holds several adapters, or one twice"
            )
        layer.tensors[role] = key
    lone = [name for name, layer in found.items() if set(layer.tensors) == {"alpha"}]
    for name in lone:
        unmatched.append(found.pop(name).tensors["alpha"])
    return found, tuple(unmatched)


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


def layer_name(module: str, unet: UNetLayout | None = None) -> str:
    """This project's name for a module as LoRA files spell it; in the part ``kohya`` where only a host can
    tell.
    """
    if module.startswith(("lora_", "lycoris_")) and "." not in module:
        return keys.from_kohya(module, unet) or f"{keys.KOHYA_PART}.{module}"
    path = module.removeprefix(PEFT_PREFIX)
    for prefix, part in _TEXT_ENCODERS.items():
        if path.startswith(prefix):
            return part + keys.canonical_path(path.removeprefix(prefix))
    if path.startswith(keys.NATIVE_PART + "."):
        for layout in (unet or UNetLayout.sdxl(), UNetLayout.sd1()):
            if found := keys.from_native(path, keys.ModelLayout.sd1(layout)):
                return found
        return path
    if path.startswith(_UNET_STARTS):
        return f"unet.{path}"
    canonical = keys.canonical_path(path)
    if canonical.startswith("text_model."):
        return f"text_encoder.{canonical}"
    part, dot, rest = path.partition(".")
    if not dot:
        return f"{keys.BARE_PART}.{path}"
    return f"{part}.{keys.canonical_path(rest)}" if part.startswith("text_encoder") else path


def _build(place: str, source: str, parts: Mapping[str, Tensor], alpha_of: AlphaOf | None) -> AdapterLayer:
    """One layer from its tensors, checked, in their own dtype."""
    for role, value in parts.items():
        is_number = role == "alpha" and not value.is_floating_point() and not value.is_complex()
        if not is_number and (value.dtype not in (*_FLOATS, *_FLOATS_8) or not _is_finite(value)):
            raise SpectralAdapterError(
                f"{place}: {role} ({value.dtype}) holds values that are not finite numbers"
            )
    parts = {k: v.half() if v.dtype in _FLOATS_8 else v for k, v in parts.items()}
    alpha = None
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise SpectralAdapterError(
                f"{place}: alpha of shape {tuple(parts['alpha'].shape)}, expected one number"
            )
        alpha = float(parts["alpha"])
    others = sorted(set(parts) & set(lycoris.ROLES))
    if others and {"down", "up"} & set(parts):
        raise SpectralAdapterError(f"{place}: holds a LoRA and {', '.join(others)}; expected one of them")
    if not others:
        return _lora(place, source, parts, alpha, alpha_of)
    down, up, scale = lycoris.factors(place, parts, alpha)
    return _layer(down, up, None if scale == 1.0 else scale * len(down))


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value.half() if value.dtype in _FLOATS_8 else value).all())


def _lora(
    place: str, source: str, parts: Mapping[str, Tensor], alpha: float | None, alpha_of: AlphaOf | None
) -> AdapterLayer:
    for role in ("down", "up"):
        if role not in parts:
            raise SpectralAdapterError(f"{place}: the {role} projection is missing; the file is damaged")
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        down = _multiplied_out(place, down, parts["mid"])
    rank = down.shape[0] if down.dim() else 0
    is_flat = up.dim() >= 2 and up.numel() == up.shape[0] * up.shape[1]
    if (
        down.dim() < 2
        or down.dim() > 5
        or down.numel() == 0
        or not is_flat
        or up.numel() == 0
        or up.shape[1] != rank
    ):
        raise SpectralAdapterError(
            f"{place}: down {tuple(down.shape)} and up {tuple(up.shape)} do not fit; expected (r, in, …) "
            "and (out, r, 1…)"
        )
    if alpha is None and alpha_of:
        alpha = alpha_of(source, rank)
    return _layer(down, up.reshape(up.shape[0], rank), alpha)


def _layer(down: Tensor, up: Tensor, alpha: float | None) -> AdapterLayer:
    rank = len(down)
    shape = LayerShape(up.shape[0], down.shape[1], tuple(down.shape[2:]))
    config = LoRAConfig(rank, None if alpha is None or alpha == rank else alpha)
    return AdapterLayer(shape, (Term(config, {"down": down.contiguous(), "up": up.contiguous()}),))


def _multiplied_out(place: str, down: Tensor, mid: Tensor) -> Tensor:
    """down (r, in, *kernel) of a CP-decomposed layer: mid (r, q, *kernel) times down (q, in, *1)."""
    is_sound = down.dim() >= 2 and mid.dim() >= 2 and down.numel() == down.shape[0] * down.shape[1]
    if not is_sound or mid.shape[1] != down.shape[0]:
        raise SpectralAdapterError(f"{place}: mid {tuple(mid.shape)} and down {tuple(down.shape)} do not fit")
    dtype = torch.float64 if torch.float64 in (down.dtype, mid.dtype) else torch.float32
    return torch.einsum("pq...,qi->pi...", mid.to(dtype), down.flatten(1).to(dtype))


def _provenance(
    file_name: str,
    metadata: Mapping[str, str],
    layers: Mapping[str, AdapterLayer],
    unmatched: tuple[str, ...],
    raw: tuple[str, ...],
) -> Provenance:
    """Name, family and trigger words where the file tells; what did not match stays on the adapter."""
    training: dict[str, Any] = {"imported_from": file_name}
    if unmatched:
        training["unmatched_tensors"] = list(unmatched)
    if raw:
        training["raw_layers"] = list(raw)
    for ours, theirs in file_metadata.BASE.items():
        if theirs in metadata:
            training[ours] = metadata[theirs]
    words = metadata.get("modelspec.trigger_phrase", "")
    return Provenance(
        name=metadata.get("ss_output_name")
        or metadata.get("modelspec.title")
        or file_name.removesuffix(".safetensors"),
        family=_family(layers),
        trigger_words=tuple(word.strip() for word in words.split(",") if word.strip()),
        training=training,
    )


def _family(layers: Mapping[str, AdapterLayer]) -> str:
    """sd1, sd2 or sdxl by the width of the text that the cross-attention reads; empty where it is another."""
    widths = {
        layer.shape.in_features
        for name, layer in layers.items()
        if name.startswith("unet.") and name.endswith(("attn2.to_k", "attn2.to_v"))
    }
    return {768: "sd1", 1024: "sd2", 2048: "sdxl"}.get(widths.pop(), "") if len(widths) == 1 else ""
