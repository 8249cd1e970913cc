"""The tensors of a LoRA file in kohya's or diffusers' names; see :mod:`.lora_export` for what they hold.

Shapes: down (R, in, *kernel), up (out, R, *1), alpha a single number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..errors import SpectralAdapterError
from ..maths.lowrank import Factors
from ..names import spellings as keys
from ..names.layer_name import LayerName

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


Written = dict[str, tuple[dict[str, Tensor], Factors]]
"""Layer -> its tensors in the file, and the exact factors that they stand for."""


def kohya(
    folded: Mapping[str, Factors], adapter: Adapter, dtype: torch.dtype, path: Path, names: Mapping[str, str]
) -> Written:
    """In kohya's names, or those of ``names``. Layers that the adapter has not are zeros that a reader wants
    (:func:`_whole_attentions`)."""
    two = keys.has_two_encoders(list(adapter.layers), adapter.provenance.family)
    found: Written = {}
    vectors = {name for name in folded if LayerName.parse(name).vector}
    for name in vectors:
        found[name] = _vector(folded[name], LayerName.parse(name), two, dtype, path, names)
    matrices = {name: factors for name, factors in folded.items() if name not in vectors}
    matrices |= _whole_attentions(matrices, adapter.provenance.family)
    for name, factors in _with_common_alphas(matrices).items():
        key = names.get(name) or keys.in_lora_file(name, two)
        down, up = _rounded(factors, dtype, f"{path}: layer {name}")
        alpha = torch.tensor(factors.scale * factors.rank, dtype=torch.float32)
        found[name] = (
            {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha},
            factors,
        )
    return found


def _whole_attentions(folded: Mapping[str, Factors], family: str) -> dict[str, Factors]:
    """Zeros for what an attention of OpenCLIP's text encoder (SDXL's second, SD 2's) lacks.

    Automatic1111 applies its four layers, which have the same shape, together, or without a word none. They
    have their neighbour's rank and scale, because diffusers takes the most frequent alpha for all.
    """
    part = "text_encoder" if family == "sd2" else "text_encoder_2"
    found: dict[str, Factors] = {}
    for name, factors in folded.items():
        before, _, last = name.rpartition(".")
        if LayerName.parse(name).part == part and before.endswith(".self_attn") and last in _ATTENTION:
            zeros = replace(factors, down=torch.zeros_like(factors.down), up=torch.zeros_like(factors.up))
            found |= {f"{before}.{leaf}": zeros for leaf in _ATTENTION}
    return {name: zeros for name, zeros in found.items() if name not in folded}


def _vector(
    factors: Factors, name: LayerName, two: bool, dtype: torch.dtype, path: Path, names: Mapping[str, str]
) -> tuple[dict[str, Tensor], Factors]:
    """A bias's or norm's difference (n,), as LoRA files hold them: ``diff_b`` and ``diff``."""
    assert name.vector is not None
    module = str(replace(name, path=name.vector[0]))
    key = names.get(module) or keys.in_lora_file(module, two)
    exact = factors.scaled_up() @ factors.down
    value = exact.flatten().to(dtype)
    if not bool(torch.isfinite(value).all()):
        raise SpectralAdapterError(f"{path}: layer {name}: values do not fit {dtype}: export as float32")
    return {f"{key}.{'diff_b' if name.vector[1] == 'bias' else 'diff'}": value.contiguous()}, Factors(
        exact.new_ones(1, 1), exact
    )


def _with_common_alphas(folded: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same updates with one alpha per part: where the layers' own differ, the most frequent of them.

    diffusers drops the alphas of single attention layers of a kohya file and takes the most frequent for all;
    with the rest of the scale in ``up`` every reader computes the same.
    """
    alphas: dict[str, list[float]] = {}
    for name, factors in folded.items():
        alphas.setdefault(LayerName.parse(name).part, []).append(factors.scale * factors.rank)
    found = {}
    for name, factors in folded.items():
        of_part = alphas[LayerName.parse(name).part]
        scale = max(of_part, key=of_part.count) / factors.rank
        is_own = math.isclose(scale, factors.scale, rel_tol=1e-9)
        found[name] = (
            factors if is_own else replace(factors, up=factors.up * (factors.scale / scale), scale=scale)
        )
    return found


def diffusers(folded: Mapping[str, Factors], dtype: torch.dtype, path: Path) -> Written:
    """In diffusers' names."""
    ranks: dict[str, int] = {}
    for name, factors in folded.items():
        part = LayerName.parse(name).part
        ranks[part] = max(ranks.get(part, 0), factors.rank)
    found: Written = {}
    for name, factors in folded.items():
        layer = LayerName.parse(name)
        if layer.rows is not None or layer.part in (keys.NATIVE_PART, keys.KOHYA_PART):
            raise SpectralAdapterError(
                f"{path}: layer {name}: has no name in diffusers; expected layers of unet, text_encoder, "
                "text_encoder_2 or another part of a pipeline, and whole weights"
            )
        whole = Factors(factors.down, factors.scaled_up())
        down, up = _rounded(_padded(whole, ranks[layer.part]), dtype, f"{path}: layer {name}")
        path_there = keys.canonical_path(layer.path) if layer.part.startswith("text_encoder") else layer.path
        key = f"{layer.part}.{path_there}"
        found[name] = (
            {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up},
            _padded(whole, ranks[layer.part]),
        )
    return found


def _padded(factors: Factors, rank: int) -> Factors:
    more = rank - factors.rank
    down = torch.cat([factors.down, factors.down.new_zeros(more, *factors.down.shape[1:])])
    return replace(
        factors, down=down, up=torch.cat([factors.up, factors.up.new_zeros(len(factors.up), more)], 1)
    )


def _balanced(factors: Factors) -> Factors:
    """The same product with row and column of each rank of like size: powers of two, so nothing is rounded
    here.

    float16 loses digits below 6e-5, where one factor of a pair often lies.
    """
    size_up, size_down = factors.up.norm(dim=0), factors.down.flatten(1).norm(dim=1)
    ratio = torch.where((size_up > 0) & (size_down > 0), size_up / size_down.clamp_min(1e-30), 1.0)
    power = torch.exp2(torch.round(torch.log2(ratio.clamp(1e-30, 1e30)) / 2))
    down = factors.down * power.reshape(-1, *(1,) * (factors.down.dim() - 1))
    return replace(factors, down=down, up=factors.up / power)


def _rounded(factors: Factors, dtype: torch.dtype, place: str) -> tuple[Tensor, Tensor]:
    """down and up as they are stored: in float16 balanced first; a convolution's up with a kernel of ones."""
    if dtype == torch.float16:
        factors = _balanced(factors)
    down, up = factors.down.to(dtype), factors.up.to(dtype)
    if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise SpectralAdapterError(
            f"{place}: values up to {max(float(t.abs().max()) for t in (factors.down, factors.up)):.3g} do "
            f"not fit {dtype}, or are not finite; export as bfloat16 or float32"
        )
    return down.contiguous(), up.reshape(*up.shape, *(1,) * (down.dim() - 2)).contiguous()


def as_read(written: Mapping[str, Tensor]) -> Factors:
    """The factors as a reader of the file takes them."""
    if len(written) == 1:
        value = next(iter(written.values()))
        return Factors(value.new_ones(1, 1), value[:, None])
    down = next(t for key, t in written.items() if key.endswith(("lora_down.weight", "lora_A.weight")))
    up = next(t for key, t in written.items() if key.endswith(("lora_up.weight", "lora_B.weight")))
    alpha = next((float(t) for key, t in written.items() if key.endswith(".alpha")), float(len(down)))
    return Factors(down, up.flatten(1), alpha / len(down))
