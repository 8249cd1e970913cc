"""FouRA's gate at its defaults: does it decide, what does it gain, what does freezing lose?

    python -m benchmarks.quality.gates [--groups main "rank 32" transform columns …] [--seeds 0 1 2 3 4]

Every cell trains on thirty drawings of the style ``poster`` (embedded model, all layers of the three block
groups, 4 pictures a step, AdamW, cosine) and measures the loss on 8 others at 8 noise levels, fixed noise.
``open``: share of gates that are open there. ``switching``: share that is open in 5 to 95 % of the cases.
``levels``: open share from high to low resolution. ``noisy``: that of the noisier half of the levels less the
other's. ``frozen``: the loss with the frozen mask. Cells are kept in the folder: the same command goes on,
and several share the work.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.drawings import style_picture
from benchmarks.claims.judge import as_tensor
from benchmarks.claims.lab import FULL, HELD_OUT_SEED, SIZE, Busy, Lab, Recipe, Shown, Task
from benchmarks.claims.recipes import COLUMNS, RANK, block
from benchmarks.common import finish
from benchmarks.quality.muon import in_place_of_adamw
from spectral_core.attach.attaching import attach
from spectral_core.errors import SpectralAdapterError
from spectral_core.methods import FouRAConfig, LoRAConfig, MethodConfig
from spectral_core.names.unet_blocks import halvings
from spectral_core.pipelines.conditioning import CaptionCache
from spectral_core.pipelines.dataset import encode_pictures
from spectral_core.pipelines.loading import diffusion_of
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.order import Order
from spectral_core.training.engine.gate_parameters import GateParameters
from spectral_core.training.engine.loop import Setup, evaluation_loss, train

PLACES = {**COLUMNS, "block 1": block(1), "block 2": block(2)}  # of columns
STYLE, PICTURES, HELD_OUT, LEVELS, BATCH = "poster", 30, 8, 8, 4
SWITCHES = 0.05
SWEPT = (1e-3, 3e-3, 9.5e-3, 3e-2)
NAME = "gates"


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

    def key(self, seed: int) -> str:
        return (
            f"{self.adapter} r{self.rank} {self.rate:g} {self.steps}"
            + (" freeze" if self.freeze else "")
            + (f" gate {self.gate_rate:g}" if self.gate_rate else "")
            + (f" {self.optimiser}" if self.optimiser else "")
            + (f" batch {self.batch}" if self.batch != BATCH else "")
            + (f" share {self.share:g}" if self.share != 0.5 else "")
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
        return FouRAConfig(self.rank, transform=transform, gate=gate)


def _three(group: str, rate: float, steps: int = 150, rank: int = RANK) -> list[Cell]:
    return [Cell(group, name, rate, steps, rank) for name in ("dct adaptive", "dct none", "lora")]


GROUPS: dict[str, list[Cell]] = {
    "main": [cell for rate in SWEPT for cell in _three("main", rate)],
    "rank 32": [*_three("rank 32", 3e-3, rank=32), Cell("rank 32", "lora", 9.5e-3, rank=32)],
    "300 steps": _three("300 steps", 3e-3, 300),
    "batch 8": [replace(cell, batch=8) for cell in _three("batch 8", 3e-3, 300)],
    "600 steps": _three("600 steps", 3e-3, 600),
    "rank 64": [replace(cell, batch=8) for cell in _three("rank 64", 3e-3, rank=64)],
    "share": [
        *(Cell("share", "dct adaptive", 3e-3, 300, batch=8, share=share) for share in (0.3, 0.4)),
        Cell("share", "dct none", 3e-3, 300, batch=8),
    ],
    "freeze": [Cell("freeze", "dct adaptive", 3e-3, freeze=True)],
    "transform": [
        *(Cell("transform", "none adaptive", 3e-3, rank=rank) for rank in (RANK, 32)),
        *(Cell("transform", name, rate) for name in ("dct none", "lora") for rate in (3e-3, 9.5e-3)),
        *(
            Cell("transform", name, rate, optimiser="muon")
            for name in ("dct none", "lora")
            for rate in (9.5e-3, 3e-2)
        ),
    ],
    "gate rate": [Cell("gate rate", "dct adaptive", 3e-3, gate_rate=k / 150) for k in (3, 6, 24)],
    "columns": [Cell("columns", place, rate) for place in PLACES for rate in (1e-3, 3e-3, 1e-2)],
}


class Seen:
    """A recorder of every gate at every noise level."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def record(self, layer: str, is_open: Tensor, progress: Any) -> None:
        level = torch.as_tensor(progress).float().reshape(-1).expand(len(is_open))
        self.rows.setdefault(layer, []).append((is_open.float(), level))

    def summary(self) -> dict[str, Any]:
        opened, total, switching, noisy, clean = 0.0, 0, 0.0, 0.0, 0.0
        by_depth: dict[int, list[float]] = {}
        levels = halvings(self.rows)
        for layer, rows in self.rows.items():
            gates, level = torch.cat([g for g, _ in rows]), torch.cat([n for _, n in rows])
            mean = gates.mean(0)
            rank = len(mean)
            total += rank
            opened += float(mean.sum())
            switching += float(((mean > SWITCHES) & (mean < 1 - SWITCHES)).sum())
            noisy += float(gates[level < 0.5].mean(0).sum())
            clean += float(gates[level >= 0.5].mean(0).sum())
            by_depth.setdefault(levels[layer], []).append(float(mean.mean()))
        return {
            "open": opened / total,
            "switching": switching / total,
            "noisy": (noisy - clean) / total,
            "levels": [round(fmean(by_depth[d]), 3) for d in sorted(by_depth)],
        }


def measured(lab: Lab, cell: Cell, seed: int) -> dict[str, Any]:
    """Train the cell, and look at it."""
    pipe = lab.pipe
    drawn = [style_picture(STYLE, 1000 * (seed + 1) + i) for i in range(PICTURES)]
    drawn += [style_picture(STYLE, HELD_OUT_SEED + i) for i in range(HELD_OUT)]
    latents = encode_pictures(pipe, as_tensor([p for p, _ in drawn]) * 2 - 1)
    encoded = CaptionCache(pipe, SIZE, keep=True)

    def denoise(noisy: Tensor, timesteps: Tensor, indices: Sequence[int | None], first: int = 0) -> Any:
        said = ["" if i is None else drawn[first + i][1] for i in indices]
        return pipe.unet(noisy, timesteps, **encoded.encode(said)).sample

    adapter = lab._fresh(Task("style", STYLE), cell.recipe, seed)
    with attach(pipe.unet, adapter, part="unet", trainable=True) as attachment:
        order = Order([Shown()] * PICTURES, cell.batch, seed)
        setup = Setup(denoise, latents[:PICTURES], order, diffusion_of(pipe), [attachment])
        unseen = replace(setup, denoiser=lambda *a: denoise(*a, first=PICTURES), latents=latents[PICTURES:])
        config = TrainConfig(
            steps=cell.steps,
            batch_size=cell.batch,
            learning_rate=cell.rate,
            schedule="cosine",
            freeze_gates=cell.freeze,
            gate_learning_rate=cell.gate_rate,
            target_open=cell.share,
            seed=seed,
        )
        started = time.process_time()
        try:
            with in_place_of_adamw() if cell.optimiser == "muon" else nullcontext():
                result = train(setup, config, adapter.methods[0])
        except SpectralAdapterError as error:
            return {"held_out": None, "error": str(error)}
        found: dict[str, Any] = {"seconds": time.process_time() - started}
        with attachment.gates.inference():
            seen = Seen()
            attachment.gates.recorder = seen  # type: ignore[assignment]
            found["held_out"] = evaluation_loss(unseen, levels=LEVELS)
            attachment.gates.recorder = None
            decisions = GateParameters(attachment)
            if len(decisions):
                assert result.gates is not None
                found |= seen.summary()
                found |= {"share": result.gates.share, "effective_rank": result.gates.effective_rank}
                with decisions.frozen():
                    found["frozen"] = evaluation_loss(unseen, levels=LEVELS)
    return found


def paired(one: Sequence[float], other: Sequence[float]) -> str:
    """Mean difference, its t, and the smallest that would have shown (t = 2)."""
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    if len(gaps) < 2 or stdev(gaps) == 0:
        return f"{fmean(gaps):+.4f}"
    error = stdev(gaps) / math.sqrt(len(gaps))
    return f"{fmean(gaps):+.4f}, t = {fmean(gaps) / error:.1f}, visible from {2 * error:.4f}"


def rows_of(cells: dict[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for every cell with its spread over the seeds that are there."""
    rows = []
    for group, planned in GROUPS.items():
        for cell in planned:
            there = [s for s in seeds if (cells.get(cell.key(s)) or {}).get("held_out") is not None]
            if not there:
                continue
            known = [cells[cell.key(s)] for s in there]
            losses = [k["held_out"] for k in known]
            row: dict[str, Any] = {"group": group, "adapter": cell.key(0).removesuffix(" seed 0")}
            row |= {"seeds": len(there), "held_out": fmean(losses)}
            row["sd"] = stdev(losses) if len(losses) > 1 else None
            if "open" in known[0]:
                row |= {name: fmean(k[name] for k in known) for name in ("open", "switching", "noisy")}
                row["frozen"] = fmean(k["frozen"] for k in known)
                row["levels"] = " ".join(
                    f"{fmean(v):.2f}" for v in zip(*(k["levels"] for k in known), strict=True)
                )
                row["against frozen"] = paired(losses, [k["frozen"] for k in known])
            row["by seed"] = {s: round(k["held_out"], 4) for s, k in zip(there, known, strict=True)}
            for other in planned:
                both = [s for s in there if (cells.get(other.key(s)) or {}).get("held_out") is not None]
                if other is not cell and ("adaptive" in cell.adapter or group == "columns") and both:
                    pairs = ([cells[c.key(s)]["held_out"] for s in both] for c in (cell, other))
                    row[f"against {other.key(0).removesuffix(' seed 0')}"] = paired(*pairs)
            rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=Path("adapters/.gates"), help="of the kept cells")
    parser.add_argument("--known", action="store_true", help="make nothing, write what is kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default=NAME, help="of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    lab = Lab(options.folder, FULL)
    cells: dict[str, Any] = {}
    for seed in options.seeds:
        for group in options.groups:
            for cell in GROUPS[group]:
                key = cell.key(seed)
                name = key.replace(" ", "_")
                if options.known:
                    cells[key] = lab.known(name)
                    continue
                with suppress(Busy):
                    cells[key] = lab.cell(name, lambda c=cell, s=seed: measured(lab, c, s))
                    print(key, cells[key], file=sys.stderr, flush=True)
    rows = rows_of(cells, options.seeds)
    settings = {"groups": options.groups, "seeds": options.seeds}
    return finish(options.name, rows, [], settings)


if __name__ == "__main__":
    sys.exit(main())
