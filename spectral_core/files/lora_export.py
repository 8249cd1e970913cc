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
from ..names.layer_name import LayerName
from ..names.unet_blocks import UNetLayout
from ..words import OneLine, chosen
from . import lora_tensors
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
        named = lora_tensors.kohya({n: f for n, (f, _) in folded.items()}, adapter, dtype, path, all_names)
    else:
        named = lora_tensors.diffusers({n: f for n, (f, _) in folded.items()}, dtype, path)
    layers: dict[str, ExportedLayer] = {}
    tensors: dict[str, Tensor] = {}
    for name, (written, exact) in named.items():
        if set(written) & set(tensors):
            raise SpectralAdapterError(
                f"{path}: layer {name}: another layer has the same name in {naming} spelling"
            )
        tensors |= written
        if name in folded:
            rounding = distance(lora_tensors.as_read(written), exact)
            layers[name] = ExportedLayer(folded[name][0].rank, rounding, folded[name][1])
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
