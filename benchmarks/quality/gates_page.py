"""The tables of docs/evidence/gates.md, from the cells of :mod:`benchmarks.quality.gates`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.claims.figures import Mean, few, table
from benchmarks.claims.page import DOCS, put
from benchmarks.quality.gates_cells import BARE, BATCH, GATE, GROUPS, LORA, PLACES, PLAIN, Cell

PAGE = DOCS / "evidence" / "gates.md"
Cells = Mapping[str, Mapping[str, Any]]


class Tables:
    """Cells by key and seed, as tables in Markdown."""

    def __init__(self, cells: Cells, seeds: Sequence[int]) -> None:
        self.cells, self.seeds = cells, seeds

    def values(self, cell: Cell, name: str = "held_out") -> dict[int, Any]:
        """Seed -> a number of the cell, where it was run."""
        found = {seed: self.cells.get(cell.key(seed), {}).get(name) for seed in self.seeds}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, cell: Cell, name: str = "held_out") -> Mean:
        return Mean(tuple(self.values(cell, name).values()))

    def difference(self, one: Cell, other: Cell, name: str = "held_out") -> str:
        """Of one's loss to ``name`` of the other at the seeds that both have."""
        first, second = self.values(one), self.values(other, name)
        return paired(Mean(tuple(first[s] - second[s] for s in first if s in second)))

    @property
    def gated(self) -> list[Cell]:
        """Those of every setting at the gates' defaults, each once."""
        found = {}
        for group in ("main", "rank 32", "rank 64", "batch 8", "600 steps"):
            for cell in GROUPS[group]:
                if cell.adapter == GATE and self.values(cell):
                    found[cell.key(0)] = cell
        return list(found.values())

    def losses(self) -> str:
        rows = []
        for cell in self.gated:
            bare, plain, lora = (replace(cell, adapter=name) for name in (BARE, PLAIN, LORA))
            means = [self.mean(cell), self.mean(cell, "frozen"), self.mean(bare), self.mean(plain)]
            means.append(self.mean(lora))
            rows.append([label(cell), str(len(means[0].values)), *(mean.text() for mean in means)])
        columns = ["setting", "seeds", "gate", "its frozen mask", "gate, no transform", "no gate", "LoRA"]
        return table(columns, rows)

    def differences(self) -> str:
        rows = []
        for cell in self.gated:
            others = [replace(cell, adapter=name) for name in (BARE, PLAIN, LORA)]
            gaps = [self.difference(cell, other) for other in others]
            rows.append([label(cell), self.difference(cell, cell, "frozen"), *gaps])
        columns = ["gate − frozen mask", "gate − gate, no transform", "gate − no gate", "gate − LoRA"]
        return table(["setting", *columns], rows)

    def best(self) -> str:
        """Of the sweep at rank 8: everything at the rate where its mean is lowest."""
        swept = GROUPS["main"]
        rows, chosen = [], {}
        for name in (GATE, BARE, PLAIN, LORA):
            cells = [cell for cell in swept if cell.adapter == name and self.values(cell)]
            if not cells:
                continue
            chosen[name] = min(cells, key=lambda cell: self.mean(cell).mean)
        gate = chosen.get(GATE)
        for name, cell in chosen.items():
            by_rate = [self.mean(replace(cell, rate=rate)).text() for rate in rates(swept)]
            against = "" if gate is None or name == GATE else self.difference(gate, cell)
            rows.append([NAMES[name], *by_rate, f"{cell.rate:g}", against])
        return table(
            ["adapter", *(f"{r:g}" for r in rates(swept)), "best", "gate − this, each at its best"], rows
        )

    def decisions(self) -> str:
        """How many gates are open and when."""
        rows = []
        for cell in self.gated:
            levels = list(self.values(cell, "levels").values())
            by_level = ", ".join(Mean(v).text(2).split(" ±")[0] for v in zip(*levels, strict=True))
            resolution = Mean(tuple(line[0] - line[-1] for line in levels))
            rows.append(
                [
                    label(cell),
                    self.mean(cell, "open").text(2),
                    self.mean(cell, "switching").text(2),
                    paired(self.mean(cell, "noisy")),
                    by_level,
                    paired(resolution),
                ]
            )
        columns = ["setting", "open", "switching", "noisy − clean half", "open, high to low resolution"]
        return table([*columns, "highest − lowest"], rows)

    def shares(self) -> str:
        plain = next(cell for cell in GROUPS["share"] if cell.adapter == PLAIN)
        rows = []
        for cell in sorted([*_gates("share"), *_gates("batch 8")], key=lambda cell: cell.share):
            if not self.values(cell):
                continue
            measured = [self.mean(cell, name).text(2) for name in ("open", "switching")]
            gaps = [self.difference(cell, plain), self.difference(cell, cell, "frozen")]
            target = f"exactly {cell.budget:g}" if cell.budget else f"{cell.share:g}"
            rows.append([target, *measured, self.mean(cell).text(), *gaps])
        columns = ["target", "open", "switching", "gate", "− no gate", "− its frozen mask"]
        return table(columns, rows) if len(rows) > 1 else ""

    def group(self, name: str) -> str:
        """Every cell of a group, and how it compares with the group's first."""
        known = [cell for cell in GROUPS[name] if self.values(cell)]
        rows = [
            [
                described(cell),
                str(len(self.values(cell))),
                self.mean(cell).text(),
                self.difference(cell, known[0]) if cell is not known[0] else "",
            ]
            for cell in known
        ]
        return table(["adapter", "seeds", "held-out loss", f"− {described(known[0])}"], rows) if rows else ""

    def columns(self) -> str:
        """The sweep of every block of columns."""
        rows = []
        swept = [cell for cell in GROUPS["columns"] if self.values(cell)]
        for place in PLACES:
            cells = {cell.rate: cell for cell in swept if cell.adapter == place}
            if cells:
                best = min(cells, key=lambda rate: self.mean(cells[rate]).mean)
                by_rate = [self.mean(cells[r]).text() if r in cells else "–" for r in rates(swept)]
                rows.append([place, *by_rate, f"{best:g}"])
        return table(["columns", *(f"{r:g}" for r in rates(swept)), "best"], rows) if rows else ""


NAMES = {GATE: "FouRA, gates", PLAIN: "FouRA, no gate", LORA: "LoRA", BARE: "no transform, gates"}


def _gates(group: str) -> list[Cell]:
    return [cell for cell in GROUPS[group] if cell.adapter == GATE]


def rates(cells: Sequence[Cell]) -> list[float]:
    return sorted({cell.rate for cell in cells})


def label(cell: Cell) -> str:
    pictures = f" of {cell.batch}" if cell.batch != BATCH else ""
    return f"rank {cell.rank}, {cell.steps} steps{pictures}, {cell.rate:g}"


def described(cell: Cell) -> str:
    """An adapter of a group with what sets it apart there."""
    own = [NAMES.get(cell.adapter, cell.adapter), f"rank {cell.rank}", f"{cell.rate:g}"]
    own += [f"gates at {cell.gate_rate * cell.steps:g} / steps"] if cell.gate_rate else []
    own += ["trained on with the mask"] if cell.freeze else []
    return ", ".join([*own, *([cell.optimiser] if cell.optimiser else [])])


def paired(gap: Mean) -> str:
    """A mean difference, its t, and the smallest that would have shown (t = 2)."""
    if not gap.values:
        return "–"
    if few(len(gap.values)) or not gap.spread:
        return f"{gap.mean:+.3f}"
    t = gap.mean / (gap.spread / math.sqrt(len(gap.values)))
    return f"{gap.mean:+.3f}, t {t:.1f}, visible {gap.visible:.3f}"


def body(cells: Cells, seeds: Sequence[int]) -> str:
    made = Tables(cells, seeds)
    parts = [
        ("Held-out loss", made.losses()),
        ("", made.differences()),
        ("Each at its best rate", made.best()),
        ("What the gates do", made.decisions()),
        ("Other shares", made.shares()),
        ("Transform and optimiser", made.group("transform")),
        ("The gates' own rate", made.group("gate rate")),
        ("Columns of Spectral A", made.columns()),
    ]
    return "\n\n".join(f"### {title}\n\n{text}" if title else text for title, text in parts if text)


def write(cells: Cells, seeds: Sequence[int], page: Path = PAGE) -> Path:
    return put(page, body(cells, seeds), "# Gates and columns")
