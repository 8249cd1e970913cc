"""Import of LoRA files: kohya's names, diffusers' (present and old), PEFT's, and ComfyUI's native ones.

Every tensor of a file is accounted for: it belongs to a layer, or it is reported, or the file is refused.
LoHa, LoKr and full differences become factors without a loss (:mod:`.lycoris`); kinds that change the weight
they find (DoRA, OFT, …) are refused by name, as they need the model.

Shapes: those of :mod:`.lora_layers`.
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

from ..adapter.adapter import Adapter, AdapterLayer, Provenance
from ..errors import SpectralAdapterError
from ..names import spellings as keys
from ..names.layer_name import LayerName
from ..names.unet_blocks import UNetLayout
from ..words import OneLine
from . import adapter_file as fileformat
from . import metadata as file_metadata
from . import other_kinds as foreign
from .container import open_safely
from .lora_alphas import PEFT_PREFIX, AlphaOf, alphas_beside, alphas_in_metadata
from .lora_layers import build_layer, layer_of_vector
from .lora_names import layer_name, layout_of, role_of

MOST_MULTIPLIED = 96 << 20  # bytes that ``lora_mid`` may become, all layers together

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

    unet: layout for native block names (``lora_unet_input_blocks_…``), by default SDXL's or SD 1's, whichever
    has them all, or the embedded model's where the file says that it is for that. Changed biases and
    norms become layers of their own, ``<layer>.bias`` and ``<layer>.weight``. PEFT files take alpha and
    ranks from the ``adapter_config.json`` beside them. with_dependent: hand out layers that need the model's
    weights instead of refusing the file. Raises SpectralAdapterError, with file and layer, for other kinds
    of adapters, halves without their partner, shapes that do not fit, and values that are not finite.
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
    if unet is None and file.metadata.get("modelspec.architecture", "").startswith("mini/"):
        unet = UNetLayout.mini()
    return _read(source, unet, with_dependent)


def lora_from_tensors(
    tensors: Mapping[str, Tensor],
    name: str = "LoRA",
    *,
    keep_names: bool = False,
    with_dependent: bool = False,
) -> ImportedLoRA:
    """A LoRA that is already in memory, such as ComfyUI's ``LORA_MODEL``, as an adapter that shares nothing
    with it.

    keep_names: leave native names as they are, which is
    right for every model, instead of reading them as those of a Stable Diffusion. Raises as
    :func:`read_lora` does.
    """

    def copies(keys: list[str]) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return {key: tensors[key].detach().cpu().clone() for key in keys}

    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    source = _Source(name, name, shapes, copies, {}, lambda: None)
    return _read(source, None, with_dependent, keep_names)


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


def _read(
    source: _Source, unet: UNetLayout | None, with_dependent: bool, keep_names: bool = False
) -> ImportedLoRA:
    vectors = {key: found for key, shape in source.shapes.items() if (found := _vector(key, shape))}
    kept = [key for key in source.shapes if key not in vectors]
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
    spelled = [found[0] for key in kept if (found := role_of(key))] + [m for m, _ in vectors.values()]
    layout = unet or layout_of(spelled)

    def name_of(module: str) -> str:
        return module if keep_names else layer_name(module, layout)

    try:
        collected, unmatched = _collect(kept, name_of)
    except SpectralAdapterError as error:
        raise SpectralAdapterError(f"{source.place}: {error}") from error
    if not (apart or vectors) and not any(set(layer.tensors) - {"alpha"} for layer in collected.values()):
        raise SpectralAdapterError(f"{source.place}: is {foreign.family(kept)}; expected a LoRA file")
    notes = []
    alpha_of = source.alphas()
    if alpha_of is None and any(key.startswith(PEFT_PREFIX) for key in kept):
        notes.append("no adapter_config.json beside the file: alpha taken as the rank of each layer")
    tensors = source.read([key for layer in collected.values() for key in layer.tensors.values()])
    _refuse_large_products(source, collected.values())
    layers = {}
    for name, layer in collected.items():
        parts = {role: tensors[key] for role, key in layer.tensors.items()}
        layers[name] = build_layer(f"{source.place}: layer {layer.source}", layer.source, parts, alpha_of)
    sources = {name: layer.source for name, layer in collected.items()}
    zero = 0
    for key, value in source.read(list(vectors)).items():
        module, parameter = vectors[key]
        name = str(LayerName.parse(f"{name_of(module)}.{parameter}"))
        if name in layers:
            raise SpectralAdapterError(f"{source.place}: tensor {key!r}: {name} is in the file twice")
        layer_ = layer_of_vector(f"{source.place}: tensor {key!r}", value)
        if bool(value.any()):
            layers[name], sources[name] = layer_, module
        else:
            zero += 1
    if zero:
        notes.append(f"{zero} biases and norms of the file change nothing and were left out")
    raw = tuple(name for name in layers if name.startswith(keys.KOHYA_PART + "."))
    if raw:
        notes.append(
            f"{len(raw)} layers have names that need the model's own map (such as {raw[0]}); they are kept "
            f"under the file's names in the part {keys.KOHYA_PART!r}"
        )
    if words := sorted({key.split(".")[1] for key in unmatched if key.startswith(_BUNDLED)}):
        notes.append(f"the file holds the trained words {', '.join(words)}, which were left out")
    adapter = Adapter(layers, _provenance(source.name, source.metadata, layers, unmatched, raw))
    dependent: dict[str, dict[str, Tensor]] = {}
    for key, value in source.read(apart).items():
        dependent.setdefault(_module_of(key, modules), {})[key] = value
    return ImportedLoRA(adapter, unmatched, raw, tuple(notes), sources, dependent)


def _module_of(key: str, modules: set[str]) -> str:
    """Which of the modules the tensor belongs to; empty for none."""
    parts = key.split(".")
    starts = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((start for start in starts if start in modules), "")


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


_VECTORS = {".diff_b": "bias", ".b_norm": "bias", ".w_norm": "weight", ".diff": "weight"}


def _vector(key: str, shape: tuple[int, ...]) -> tuple[str, str] | None:
    """(module's name, bias or weight) of a tensor that is the difference of a vector."""
    for end, parameter in _VECTORS.items():
        if key.endswith(end) and (end != ".diff" or len(shape) == 1):
            return key.removesuffix(end), parameter
    return None


def _collect(
    names: Iterable[str], name_of: Callable[[str], str]
) -> tuple[dict[str, _Layer], tuple[str, ...]]:
    """Layer name -> its tensors by role (up, down, mid, alpha); and the names that play no role."""
    found: dict[str, _Layer] = {}
    unmatched = []
    for key in names:
        found_role = role_of(key)
        if found_role is None:
            unmatched.append(key)
            continue
        module, role = found_role
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
    return Provenance(
        name=metadata.get("ss_output_name")
        or metadata.get("modelspec.title")
        or file_name.removesuffix(".safetensors"),
        family=_family(layers),
        trigger_words=file_metadata.trained_words(metadata),
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
