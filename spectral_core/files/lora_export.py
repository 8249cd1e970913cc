"""Export to an ordinary LoRA file, in kohya's or diffusers' names, and (from :mod:`.lora_import`) import of
one.

ΔW = (alpha / rows) · up · down is exact for every method but an adaptive gate, which is exported with its
frozen mask; the report says what that loses. alpha_file = scale · rows, so it is alpha for ``dct`` and
``none``, 2·alpha for ``dft``, times open / r for a frozen gate, 2r for Spectral A and r for Spectral R. Where
these differ within a part the most frequent stands for all and ``up`` takes the rest, because diffusers
cannot keep them apart. diffusers' names have no alpha: there the scale is in ``lora_B``, and ranks are padded
with zeros to one per part, because releases of diffusers before the one tested here scale layers of different
ranks by a common alpha. The strength is multiplied into ``up``.

Shapes: down (R, in, *kernel), up (out, R, *1), alpha a single number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..adapter.adapter import Adapter, AdapterLayer, require_adapter
from ..errors import SpectralAdapterError
from ..maths.lowrank import Factors, concatenate
from ..methods import method_of
from ..names import spellings as keys
from ..names.layer_name import LayerName
from ..names.unet_blocks import UNetLayout
from ..words import OneLine, chosen
from . import metadata as file_metadata
from . import writing as safewrite
from .lora_errors import distance, gate_loss
from .lora_import import ImportedLoRA, import_lora, read_lora
from .lora_names import by_block_numbers

__all__ = [
    "NAMINGS",
    "ExportReport",
    "ExportedLayer",
    "ImportedLoRA",
    "export_lora",
    "import_lora",
    "read_lora",
]

Naming = Literal["kohya", "diffusers"]
NAMINGS: tuple[Naming, ...] = get_args(Naming)
_FLAT = ("lora_", "lycoris_")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of the file.

    rounding: ‖ΔW in the file − ΔW‖ / ‖ΔW‖ (Frobenius), measured. gate_loss: the same of a gated layer's
    exported ΔW against the gated one, expected from the gates' mean openings for inputs without a preferred
    direction and gates that open independently; None without an adaptive gate.
    """

    rank: int
    rounding: float
    gate_loss: float | None = None


@dataclass(frozen=True, repr=False)
class ExportReport(OneLine):
    """What an export wrote, left out (layer -> why) and lost. ``str(report)`` is for people."""

    path: Path
    naming: str
    layers: Mapping[str, ExportedLayer]
    omitted: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def rounding(self) -> float:
        """The largest relative rounding error of a layer."""
        return max(layer.rounding for layer in self.layers.values())

    @property
    def gate_loss(self) -> float | None:
        """The largest expected relative loss of a layer through its frozen gate; None where no gate was
        adaptive.
        """
        losses = [layer.gate_loss for layer in self.layers.values() if layer.gate_loss is not None]
        return max(losses) if losses else None

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers.values()]
        lines = [
            f"{self.path.name}: {len(ranks)} layers in {self.naming} names, rank {min(ranks)} to "
            f"{max(ranks)}, rounding error at most {self.rounding:.1e} of a layer's update"
        ]
        if self.omitted:
            lines.append(f"left out: {'; '.join(f'{name} ({why})' for name, why in self.omitted.items())}")
        return "\n".join([*lines, *self.notes])


def export_lora(
    adapter: Adapter,
    path: str | os.PathLike[str],
    naming: Naming = "kohya",
    dtype: torch.dtype = torch.float16,
    *,
    overwrite: bool = False,
    drop_schedule: bool = False,
    names: Mapping[str, str] | None = None,
    layout: UNetLayout | None = None,
    words: bool = False,
) -> ExportReport:
    """Write an adapter as an ordinary LoRA file at its present strengths.

    names: layer -> its module's name in the file, where a reader's own map knows it better than the rules of
    kohya's naming, such as rows of a fused weight. layout: the model's blocks; where they are not Stable
    Diffusion's (as of the embedded model, which is known), kohya's file names them by number. words: the
    adapter's trained words too, as ``bundle_emb.<word>.*``, which Automatic1111 reads and others report as
    unknown.

    Raises SpectralAdapterError for a schedule (a LoRA file cannot hold one; ``drop_schedule`` exports without
    it), layers that the naming cannot name, values that ``dtype`` cannot hold, and everything that saving
    refuses.

    >>> import torch, spectral_core as sc
    >>> name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    >>> adapter = sc.create({name: torch.randn(8, 6)}, sc.LoRAConfig(rank=2))
    >>> learned = adapter.map_terms(lambda _, t: type(t)(t.config, {k: v + 1 for k, v in t.params.items()}))
    >>> sc.export_lora(learned, "exported.safetensors").naming
    'kohya'
    """
    path = Path(path)
    require_adapter(adapter)
    naming = chosen(naming, NAMINGS, f"{path}: naming")
    if dtype not in DTYPES:
        raise SpectralAdapterError(f"{path}: dtype {dtype}: expected float32, float16 or bfloat16")
    if adapter.schedule is not None and not drop_schedule:
        raise SpectralAdapterError(
            f"{path}: the adapter's strength is scheduled over the denoising, which a LoRA file cannot hold; "
            "remove the schedule, or allow dropping it"
        )
    folded: dict[str, tuple[Factors, float | None]] = {}
    omitted: dict[str, str] = {}
    for name, layer in adapter.layers.items():
        factors, loss = _fold(layer, adapter.strength_of(name))
        if naming == "diffusers" and LayerName.parse(name).vector:
            omitted[name] = "diffusers' names have no biases and norms"
        elif factors.rank == 0:
            omitted[name] = "every gate closed: rank 0"
        elif factors.scale == 0 or not bool(factors.up.any()):
            omitted[name] = "its update is zero"
        else:
            folded[name] = factors, loss
    if not folded:
        raise SpectralAdapterError(
            f"{path}: no layer has an update: {_first(omitted)}; there is nothing to export"
        )
    if naming == "kohya":
        layout = layout or (UNetLayout.mini() if adapter.provenance.family == "mini" else None)
        numbered = {} if layout is None else by_block_numbers(folded, layout)
        all_names = numbered | dict(names or {})
        named = _kohya({n: f for n, (f, _) in folded.items()}, adapter, dtype, path, all_names)
    else:
        named = _diffusers({n: f for n, (f, _) in folded.items()}, adapter, dtype, path)
    layers: dict[str, ExportedLayer] = {}
    tensors: dict[str, Tensor] = {}
    for name, (written, exact) in named.items():
        if set(written) & set(tensors):
            raise SpectralAdapterError(
                f"{path}: layer {name}: another layer has the same name in {naming} spelling"
            )
        tensors |= written
        rounding = distance(_as_read(written), exact)
        layers[name] = ExportedLayer(folded[name][0].rank, rounding, folded[name][1])
    if naming == "kohya":
        tensors |= _whole_attentions({n: f for n, (f, _) in folded.items()}, adapter, dtype)
    bundled = _bundled(adapter, path) if words else {}
    tensors |= bundled
    notes = _notes(adapter, layers, bool(bundled))
    own = [name for name, (written, _) in named.items() if not next(iter(written)).startswith(_FLAT)]
    if own and naming == "kohya":
        notes += (
            f"{len(own)} layers have no name of kohya's that "
            + ("the model knows" if names else "is sure without the model")
            + f" and are written with dots, such as {own[0]}: ComfyUI, Forge and diffusers read such names",
        )
    safewrite.write(tensors, _metadata(adapter, path, layers, tensors), path, overwrite)
    return ExportReport(path, naming, layers, omitted, notes)


def _first(omitted: Mapping[str, str]) -> str:
    return next((f"{name}: {why}" for name, why in omitted.items()), "it has no layers")


def _fold(layer: AdapterLayer, strength: float) -> tuple[Factors, float | None]:
    """One pair of factors, its scale the method's own (alpha / rank), and the frozen gates' expected loss."""
    terms = []
    for term in layer.terms:
        if not term.mergeable:
            config, params = method_of(term.config).freeze(term.config, term.params)
            term = replace(term, config=config, params=params)
        factors = term.factors(layer.shape, strength)
        own = term.config.scale
        terms.append(replace(factors, up=factors.up * (factors.scale / own), scale=own) if own else factors)
    return concatenate(terms), None if layer.mergeable else gate_loss(layer)


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


Written = dict[str, tuple[dict[str, Tensor], Factors]]
"""Layer -> its tensors in the file, and the exact factors that they stand for."""


def _kohya(
    folded: Mapping[str, Factors], adapter: Adapter, dtype: torch.dtype, path: Path, names: Mapping[str, str]
) -> Written:
    two = keys.has_two_encoders(list(adapter.layers), adapter.provenance.family)
    found: Written = {}
    vectors = {name for name in folded if LayerName.parse(name).vector}
    for name in vectors:
        found[name] = _vector(folded[name], LayerName.parse(name), two, dtype, path, names)
    matrices = {name: factors for name, factors in folded.items() if name not in vectors}
    for name, factors in _with_common_alphas(matrices).items():
        key = names.get(name) or keys.in_lora_file(name, two)
        down, up = _rounded(factors, dtype, f"{path}: layer {name}")
        alpha = torch.tensor(factors.scale * factors.rank, dtype=torch.float32)
        found[name] = (
            {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha},
            factors,
        )
    return found


_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def _whole_attentions(
    folded: Mapping[str, Factors], adapter: Adapter, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Zeros for what an attention of OpenCLIP's text encoder (SDXL's second, SD 2's) lacks in the file.

    Automatic1111 applies its four layers, which have the same shape, together, or without a word none.
    """
    family = adapter.provenance.family
    two = keys.has_two_encoders(list(adapter.layers), family)
    part = "text_encoder" if family == "sd2" else "text_encoder_2"
    found: dict[str, Tensor] = {}
    for name, factors in folded.items():
        before, _, last = name.rpartition(".")
        if LayerName.parse(name).part != part or not before.endswith("self_attn") or last not in _ATTENTION:
            continue
        for mate in (f"{before}.{leaf}" for leaf in _ATTENTION):
            if mate not in folded:
                key = keys.in_lora_file(mate, two)
                found[f"{key}.lora_down.weight"] = torch.zeros(1, factors.shape.in_features, dtype=dtype)
                found[f"{key}.lora_up.weight"] = torch.zeros(factors.shape.out_features, 1, dtype=dtype)
                found[f"{key}.alpha"] = torch.tensor(1.0)
    return found


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


def _diffusers(folded: Mapping[str, Factors], adapter: Adapter, dtype: torch.dtype, path: Path) -> Written:
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


def _as_read(written: Mapping[str, Tensor]) -> Factors:
    """The factors as a reader of the file takes them."""
    if len(written) == 1:
        value = next(iter(written.values()))
        return Factors(value.new_ones(1, 1), value[:, None])
    down = next(t for key, t in written.items() if key.endswith(("lora_down.weight", "lora_A.weight")))
    up = next(t for key, t in written.items() if key.endswith(("lora_up.weight", "lora_B.weight")))
    alpha = next((float(t) for key, t in written.items() if key.endswith(".alpha")), float(len(down)))
    return Factors(down, up.flatten(1), alpha / len(down))


def _bundled(adapter: Adapter, path: Path) -> dict[str, Tensor]:
    """The trained words' rows (k, dim) in Automatic1111's names: one text encoder's, or both of SDXL's."""
    found: dict[str, Tensor] = {}
    for word, rows in adapter.tokens.items():
        if "." in word:
            raise SpectralAdapterError(
                f"{path}: word {word!r}: a word with a dot has no name in a LoRA file; export without words"
            )
        if len(rows) == 1:
            keys_of = {"string_to_param.*": next(iter(rows.values()))}
        else:
            keys_of = {{"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[p]: r for p, r in rows.items()}
        found |= {f"bundle_emb.{word}.{k}": r.detach().cpu().float().clone() for k, r in keys_of.items()}
    return found


def _notes(adapter: Adapter, layers: Mapping[str, ExportedLayer], words: bool) -> tuple[str, ...]:
    notes = []
    gated = {name: layer.gate_loss for name, layer in layers.items() if layer.gate_loss is not None}
    if gated:
        worst = max(gated, key=lambda name: gated[name] or 0.0)
        notes.append(
            f"{len(gated)} layers have an adaptive gate and were exported with their frozen mask: expected "
            f"to lose up to {gated[worst]:.1%} of the gated update's norm ({worst}), for inputs without a "
            "preferred direction"
        )
        if adapter.provenance.frozen_gates:
            notes.append(f"frozen gates, {adapter.provenance.frozen_gates}")
    if adapter.schedule is not None:
        notes.append("the strength schedule was dropped: the file has the full strength all the time")
    if words:
        notes.append(
            f"trained words in the file: {', '.join(adapter.tokens)}; Automatic1111 reads them, Forge, Forge "
            "Neo and ComfyUI do not"
        )
    elif adapter.tokens:
        notes.append(f"trained words are not in a LoRA file: {', '.join(adapter.tokens)}")
    if not all(term.config.is_linear for layer in adapter.layers.values() for term in layer.terms):
        notes.append("layers whose strength turns the rotation are exact at this strength only")
    return tuple(notes)


def _metadata(
    adapter: Adapter, path: Path, layers: Mapping[str, ExportedLayer], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """What LoRA managers show; rank and alpha are those of the file."""
    shown = file_metadata.describe(adapter, path.stem, "networks.lora", "lora")
    alphas = {float(t) for key, t in tensors.items() if key.endswith(".alpha")}
    rank = max(layer.rank for layer in layers.values())
    alpha = f"{alphas.pop():g}" if len(alphas) == 1 else ("Dynamic" if alphas else str(rank))
    return shown | {"ss_network_dim": str(rank), "ss_network_alpha": alpha, "format": "pt"}
