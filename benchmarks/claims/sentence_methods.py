"""The methods that are compared on a pretrained sentence encoder: ours, PEFT's and SVDiff.

Two budgets: ``large`` is what LoRA of rank 8 trains on every linear layer of MiniLM (55,296 numbers a block;
DoRA 6 % more, OFT in blocks of 32 3 % less, gates 1 % more), ``small`` what LoRA of rank 1 does (6,912; VeRA
4,992, Spectral R of 32 columns 6,144, SVDiff 2,304: the method has no other size).

Shapes: x (..., in), W (out, in), singular values (k,), k = min(out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims.recipes import COLUMNS
from spectral_core.adapter.adapter import Adapter, create
from spectral_core.attach.attaching import Attachment, attach
from spectral_core.attach.targets import find_targets
from spectral_core.maths.svd_cache import SVDCache
from spectral_core.methods import FouRAConfig, MethodConfig, SpectralRConfig
from spectral_core.training.engine.columns import basis_source

RANK, SMALL_RANK, BLOCK, VERA_RANK, ROTATED = 8, 1, 32, 256, 32
LAYERS = "encoder.*"


@dataclass(frozen=True)
class Ready:
    """A model with something to train: our attachments, or somebody else's parameters."""

    model: nn.Module
    attachments: Sequence[Attachment]
    parameters: Sequence[nn.Parameter]  # of others


Place = Callable[
    [nn.Module, int, SVDCache], Any
]  # (the base model, seed, singular columns) -> context of Ready


@dataclass(frozen=True)
class Method:
    """label: for tables. budget: large or small. start: where the sweep of its rate begins. kind: what the
    trainer calls it. place: puts it on a model."""

    label: str
    budget: str
    start: float
    kind: str
    place: Place


def ours(configure: Callable[[Tensor], MethodConfig]) -> Place:
    """An adapter of this project."""

    @contextmanager
    def place(base: nn.Module, seed: int, cache: SVDCache) -> Iterator[Ready]:
        weights = find_targets(base, "unet", LAYERS)[0]
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for name, weight in weights.items():
            config = configure(weight)
            one = create({name: weight.float()}, config, basis_source(config, cache), generator)
            layers |= one.layers
        with attach(base, Adapter(layers), part="unet", trainable=True) as attachment:
            yield Ready(base, [attachment], [])

    return place


def pefts(configure: Callable[[list[str]], Any]) -> Place:
    """A method of the library PEFT."""

    @contextmanager
    def place(base: nn.Module, seed: int, cache: SVDCache) -> Iterator[Ready]:
        from peft import get_peft_model

        torch.manual_seed(seed)
        names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.startswith("encoder.")]
        model = get_peft_model(deepcopy(base), configure(names)).eval()
        yield Ready(model, [], [p for p in model.parameters() if p.requires_grad])

    return place


class SingularShifts(nn.Module):
    """SVDiff (Han et al., ICCV 2023): y + U·(relu(σ + δ) − σ)·Vᵀ·x, δ trained, zero at first."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(layer.weight.float(), full_matrices=False)
        self.layer, self.u, self.s, self.vh = layer, u.to(layer.weight), s, vh.to(layer.weight)
        self.delta = nn.Parameter(torch.zeros_like(s))

    def forward(self, x: Tensor) -> Tensor:
        change = torch.relu(self.s + self.delta) - self.s
        return self.layer(x) + nn.functional.linear(nn.functional.linear(x, self.vh) * change, self.u)


@contextmanager
def svdiff(base: nn.Module, seed: int, cache: SVDCache) -> Iterator[Ready]:
    model = deepcopy(base)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("encoder."):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, SingularShifts(module))
    yield Ready(model, [], [p for p in model.parameters() if p.requires_grad])


def _lora(names: list[str], rank: int = RANK, dora: bool = False) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, target_modules=names, use_dora=dora)


def _oft(names: list[str]) -> Any:
    from peft import OFTConfig

    return OFTConfig(r=0, oft_block_size=BLOCK, target_modules=names)


def _vera(names: list[str]) -> Any:
    from peft import VeraConfig

    return VeraConfig(r=VERA_RANK, target_modules=names)


def _foura(gate: str) -> Place:
    return ours(lambda _: FouRAConfig(RANK, transform="dct", gate=gate))


_ROTATION = SpectralRConfig(tuple(range(ROTATED)), train_scale=True)


def _columns(place: str) -> Method:
    return Method(
        f"Spectral A, 8 {place} columns", "large", 1e-3, "spectral_a", ours(COLUMNS[place].configure)
    )


METHODS: Mapping[str, Method] = {
    "lora": Method("LoRA, rank 8", "large", 3e-3, "lora", pefts(_lora)),
    "top": _columns("top"),
    "bottom": _columns("bottom"),
    "foura": Method("FouRA, rank 8, no gate", "large", 3e-3, "foura", _foura("none")),
    "foura_gate": Method("FouRA, rank 8, gate", "large", 3e-3, "foura", _foura("adaptive")),
    "spectral_r": Method("Spectral R, 32 columns", "small", 3e-3, "spectral_r", ours(lambda _: _ROTATION)),
    "lora_1": Method("LoRA, rank 1", "small", 3e-3, "lora", pefts(lambda n: _lora(n, SMALL_RANK))),
    "oft": Method("OFT, blocks of 32", "large", 1e-3, "lora", pefts(_oft)),
    "random": _columns("random"),
    "vera": Method("VeRA, rank 256", "small", 3e-2, "lora", pefts(_vera)),
    "dora": Method("DoRA, rank 8", "large", 3e-3, "lora", pefts(lambda n: _lora(n, dora=True))),
    "middle": _columns("middle"),
    "svdiff": Method("SVDiff", "small", 1e-2, "lora", svdiff),
}
REFERENCE: Mapping[str, str] = {"large": "lora", "small": "lora_1"}
