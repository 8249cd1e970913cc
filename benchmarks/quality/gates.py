"""FouRA's gate at its defaults: does it decide, what does it gain, what does freezing lose?

    python -m benchmarks.quality.gates [--groups main "rank 32" transform columns …] [--seeds 0 1 2 3 4]

Every cell trains on thirty drawings of the style ``poster`` (embedded model, all layers of the three block
groups, 4 pictures a step, AdamW, cosine) and measures the loss on 8 others at 8 noise levels, fixed noise.
``open``: share of gates that are open there. ``switching``: share that is open in 5 to 95 % of the cases.
``levels``: open share from high to low resolution. ``noisy``: that of the noisier half of the levels less the
other's. ``frozen``: the loss with the frozen mask. Cells are kept in the folder: the same command goes on,
and several share the work. At the end it writes the tables of docs/evidence/gates.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.drawings import style_picture
from benchmarks.claims.judge import as_tensor
from benchmarks.claims.lab import FULL, HELD_OUT_SEED, SIZE, Busy, Lab, Shown, Task
from benchmarks.common import RESULTS, finish
from benchmarks.quality import gates_page
from benchmarks.quality.gates_cells import GROUPS, Cell
from benchmarks.quality.muon import in_place_of_adamw
from spectral_core.attach.attaching import attach
from spectral_core.errors import SpectralAdapterError
from spectral_core.names.unet_blocks import halvings
from spectral_core.pipelines.conditioning import CaptionCache
from spectral_core.pipelines.dataset import encode_pictures
from spectral_core.pipelines.loading import diffusion_of
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.order import Order
from spectral_core.training.engine.gate_parameters import GateParameters
from spectral_core.training.engine.loop import Setup, evaluation_loss, train

STYLE, PICTURES, HELD_OUT, LEVELS = "poster", 30, 8, 8
SWITCHES = 0.05
NAME = "gates"
SEEDS = (0, 1, 2, 3, 4)


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
            target_open=0.0 if cell.budget else cell.share,
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


def published(lab: Lab, name: str) -> dict[str, dict[str, Any]]:
    """The cells of an earlier run that came with the project, if they were measured on these weights."""
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kept.get("settings", {}).get("weights") != lab.weights:
        return {}
    return {row.pop("cell"): row for row in kept["rows"]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--folder", type=Path, default=Path("adapters/.gates"), help="of the kept cells")
    parser.add_argument("--known", action="store_true", help="make nothing, write what is kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default=NAME, help="of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    lab = Lab(options.folder, FULL)
    cells = published(lab, options.name)
    for seed in options.seeds:
        for group in options.groups if not options.known else []:
            for cell in GROUPS[group]:
                key = cell.key(seed)
                if key in cells:
                    continue
                with suppress(Busy):
                    cells[key] = lab.cell(file_of(key), lambda c=cell, s=seed: measured(lab, c, s))
                    print(key, cells[key], file=sys.stderr, flush=True)
    planned = {cell.key(seed) for seed in SEEDS for cells_ in GROUPS.values() for cell in cells_}
    cells |= {key: found for key in planned if (found := lab.known(file_of(key)))}
    rows = [{"cell": key, **cells[key]} for key in sorted(cells)]
    print(f"written: {gates_page.write(cells, SEEDS).name}")
    return finish(options.name, rows, [], {"weights": lab.weights})


def file_of(key: str) -> str:
    return key.replace(" ", "_")


if __name__ == "__main__":
    sys.exit(main())
