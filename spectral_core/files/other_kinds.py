"""Files that are something else: what they are, told by their first bytes or by their tensors' names.

A user who picks the wrong file should read what it is and what to do with it, not that a tensor is missing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

_PICKLE = (
    "such files can run code when they are opened and are never read here. Convert it to .safetensors with "
    "the tool that made it"
)
_FIRST_BYTES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", f"is a zip archive or a PyTorch file with pickles in it (.pt, .ckpt, .bin): {_PICKLE}"),
    (b"GGUF", "is a GGUF file, a quantised model; expected a .safetensors file"),
    (b"\x89HDF", "is an HDF5 file; expected a .safetensors file"),
    (b"\x1f\x8b", "is a gzip archive; unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive; unpack it first"),
    (b"Rar!", "is a RAR archive; unpack it first"),
    (b"\x89PNG", "is a PNG picture; expected a .safetensors file"),
    (b"\xff\xd8\xff", "is a JPEG picture; expected a .safetensors file"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
)
_WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html|<\?xml)", re.IGNORECASE)


def of_first_bytes(head: bytes) -> str:
    """What a file is that cannot be safetensors, as the rest of a sentence; empty where it may be one."""
    if not head:
        return "is empty (0 bytes): the download or the copy did not finish"
    for magic, reason in _FIRST_BYTES:
        if head.startswith(magic):
            return reason
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:  # pickle protocols 2 … 5
        return f"is a pickle file (.pt, .ckpt, .bin): {_PICKLE}"
    if _WEB_PAGE.match(head):
        return "is a web page: the download needs a login or the address was wrong. Download it again"
    if head.lstrip()[:1] == b"{" and head[:8].isascii():
        return "is a JSON text; expected a .safetensors file"
    return ""


def near_names(path: Path) -> str:
    """``; did you mean …`` with similar file names of the same folder; empty where there are none."""
    folder = path.parent
    if not folder.is_dir():
        return f": the folder {folder} does not exist"
    try:
        names = [entry.name for entry in folder.iterdir() if entry.suffix == ".safetensors"]
    except OSError:  # a folder that may be entered but not listed
        return ""
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


# Kinds of adapters that are not computed here, by the ends of their tensors' names. DoRA comes first: its
# files hold ordinary LoRA tensors too.
_OTHER_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("DoRA", re.compile(r"\.(dora_scale|lora_magnitude_vector(\.weight|\.default\.weight|\.default)?)$")),
    ("LoHa", re.compile(r"\.hada_(w[12]_[ab]|t[12])$")),
    ("LoKr", re.compile(r"\.lokr_(w[12](_[ab])?|t2)$")),
    (
        "BOFT or OFT",
        re.compile(r"\.(oft_(blocks|diag|R|r)|boft_[RsP]|oft_R\.weight)(\.default)?(\.weight)?$"),
    ),
    ("GLoRA", re.compile(r"\.([ab][12]|bm?[12])\.weight$")),
    ("IA3", re.compile(r"\.(on_input|ia3_l)$")),
    ("VeRA", re.compile(r"\.vera_lambda_[bd]")),
    ("Bone or MiSS", re.compile(r"\.(bone|miss)_block")),
    ("LoRA with bias", re.compile(r"\.(lora_B|lora_up)(\.\w+)?\.bias$")),
    ("LoRA of an embedding", re.compile(r"\.lora_embedding_[AB]")),
    ("LoRA with changed shape", re.compile(r"\.reshape_weight$")),
    ("norm difference (LyCORIS)", re.compile(r"\.[wb]_norm$")),
    ("full weights", re.compile(r"\.set_weight$")),
    ("full difference", re.compile(r"\.diff(_b)?$")),
)


def adapter_kind(name: str) -> str:
    """The kind of adapter, of those not read here, whose tensor has this name; empty for any other."""
    return next((kind for kind, pattern in _OTHER_KINDS if pattern.search(name)), "")


_LORA = re.compile(
    r"\.(lora_(up|down|mid|A|B)(\.\w+)?\.weight|lora\.(up|down)\.weight|\w+_lora\.(up|down)\.weight"
    r"|lora_linear_layer\.(up|down)\.weight)$"
)
_WHOLE_MODELS: tuple[tuple[str, str], ...] = (
    ("model.diffusion_model.", "a whole checkpoint"),
    ("control_model.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("first_stage_model.", "an autoencoder (VAE)"),
    ("decoder.mid", "an autoencoder (VAE)"),
    ("encoder.mid", "an autoencoder (VAE)"),
    ("down_blocks.", "a diffusers UNet"),
    ("double_blocks.", "a Flux model"),
    ("transformer_blocks.", "a diffusers transformer"),
    ("text_model.", "a text encoder"),
    ("cond_stage_model.", "a text encoder"),
)


def family(names: Iterable[str]) -> str:
    """What a safetensors file is that does not say it is ours: the rest of a sentence, with what to do."""
    names = list(names)
    for name in names:
        if kind := adapter_kind(name):
            return f"a {kind} file (tensor {name!r}): this kind of adapter is not computed here"
    if any(_LORA.search(name) for name in names):
        return "a LoRA file: import it with import_lora instead"
    if names and (set(names) <= {"clip_l", "clip_g", "emb_params", "t5xxl"} or "emb_params" in names):
        return "a textual inversion (embedding) file: use it as an embedding"
    for prefix, kind in _WHOLE_MODELS:
        if any(name.startswith(prefix) for name in names):
            return f"{kind}, not an adapter"
    return "of a kind that is not known here" if names else "without any tensor"
