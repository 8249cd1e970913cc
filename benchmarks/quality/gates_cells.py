"""What :mod:`benchmarks.quality.gates` trains: adapters in groups that are compared with each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.claims.lab import Recipe
from benchmarks.claims.recipes import COLUMNS, RANK, block
from spectral_core.methods import FouRAConfig, LoRAConfig, MethodConfig

PLACES = {**COLUMNS, "block 1": block(1), "block 2": block(2)}  # of columns
BATCH = 4
SWEPT = (1e-3, 3e-3, 9.5e-3, 3e-2)


@dataclass(frozen=True)
class Cell:
    """An adapter, trained at a rate for some steps."""

    group: str
    adapter: str
    rate: float
    steps: int = 150
    rank: int = RANK
    freeze: bool = False
    gate_rate: float = 0.0
    optimiser: str = ""
    batch: int = BATCH
    share: float = 0.5  # the target
    budget: float = 0.0  # exactly this share open instead

    def key(self, seed: int) -> str:
        return (
            f"{self.adapter} r{self.rank} {self.rate:g} {self.steps}"
            + (" freeze" if self.freeze else "")
            + (f" gate {self.gate_rate:g}" if self.gate_rate else "")
            + (f" {self.optimiser}" if self.optimiser else "")
            + (f" batch {self.batch}" if self.batch != BATCH else "")
            + (f" share {self.share:g}" if self.share != 0.5 else "")
            + (f" budget {self.budget:g}" if self.budget else "")
            + f" seed {seed}"
        )

    @property
    def recipe(self) -> Recipe:
        if self.adapter in PLACES:
            return PLACES[self.adapter]
        return Recipe(self.adapter, lambda _: self.config, self.rate)

    @property
    def config(self) -> MethodConfig:
        if self.adapter == "lora":
            return LoRAConfig(self.rank)
        transform, gate = self.adapter.split()
        return FouRAConfig(self.rank, transform=transform, gate=gate, gate_budget=self.budget)


GATE, BARE, PLAIN, LORA = "dct adaptive", "none adaptive", "dct none", "lora"  # BARE: gates, no transform


def _three(group: str, rate: float, steps: int = 150, rank: int = RANK) -> list[Cell]:
    return [Cell(group, name, rate, steps, rank) for name in (GATE, PLAIN, LORA)]


GROUPS: dict[str, list[Cell]] = {
    "main": [cell for rate in SWEPT for cell in (*_three("main", rate), Cell("main", BARE, rate))],
    "rank 32": [*_three("rank 32", 3e-3, rank=32), Cell("rank 32", "lora", 9.5e-3, rank=32)],
    "batch 8": [replace(cell, batch=8) for cell in _three("batch 8", 3e-3, 300)],
    "600 steps": _three("600 steps", 3e-3, 600),
    "rank 64": [
        replace(cell, batch=8)
        for cell in (*_three("rank 64", 3e-3, rank=64), Cell("rank 64", BARE, 3e-3, rank=64))
    ],
    "share": [
        *(Cell("share", "dct adaptive", 3e-3, 300, batch=8, share=share) for share in (0.3, 0.4)),
        Cell("share", "dct adaptive", 3e-3, 300, batch=8, budget=0.5),
        Cell("share", "dct none", 3e-3, 300, batch=8),
    ],
    "freeze": [Cell("freeze", "dct adaptive", 3e-3, freeze=True)],
    "transform": [
        *(Cell("transform", name, 3e-3) for name in (GATE, BARE, PLAIN, LORA)),
        *(
            Cell("transform", name, rate, optimiser="muon")
            for name in ("dct none", "lora")
            for rate in (9.5e-3, 3e-2)
        ),
    ],
    "gate rate": [Cell("gate rate", "dct adaptive", 3e-3, gate_rate=k / 150) for k in (3, 6, 24)],
    "columns": [Cell("columns", place, rate) for place in PLACES for rate in (1e-3, 3e-3, 1e-2)],
}
