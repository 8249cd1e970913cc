"""Which fusion keeps three trained concepts, measured layer by layer on the embedded model.

    python -m benchmarks.quality.merging FOLDER [--method lora] [--steps 100] [--threads N]

Trains three concepts that share their prompts' words (two drawn characters, and one of them recoloured and
upside down) on every layer of the embedded model, with ``lora`` of rank 8, ``spectral_a`` of 4 columns in
disjoint blocks, or ``same``, Spectral A all in the first block. Adapters and statistics are kept in FOLDER
and used again. Every merging candidate of :mod:`benchmarks.quality.merge_candidates` and every fusion with
statistics is then judged on held-out inputs: other seeds' denoising under each concept.

    objective   Σᵢ‖(ΔW − ΔWᵢ)Xᵢ‖² / Σᵢ‖ΔWᵢXᵢ‖², mean over layers, and ``total`` with the squares summed first
    retention   1 − ‖(ΔW − ΔWᵢ)Xᵢ‖/‖ΔWᵢXᵢ‖ of each concept, squares summed over layers
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.claims.drawings import BACKGROUNDS
from benchmarks.common import finish
from benchmarks.quality.merge_candidates import CANDIDATES
from demo_model.draw import PIXELS, draw_concept
from spectral_core.adapter.adapter import Adapter
from spectral_core.files import adapter_file as fileformat
from spectral_core.fusion import FusionOptions, freeze, fuse
from spectral_core.maths.lowrank import delta
from spectral_core.pipelines import apply, generate, load_pipeline
from spectral_core.pipelines.job import Job
from spectral_core.pipelines.train import train_adapter
from spectral_core.statistics import file as statistics_file
from spectral_core.statistics.collect import collect, modules_of
from spectral_core.statistics.moments import Statistics
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.engine.named_run import Output

MODEL = Path(__file__).resolve().parents[2] / "demo_model"
NAMES = ("bot", "fish", "imp")
PICTURES = 12
TARGETS = "down_blocks.*, mid_block.*, up_blocks.*"
RATES = {"lora": 3e-3, "spectral_a": 2e-2, "same": 2.9e-2}  # 1e-2 times the columns' mean singular value
FIT, HELD_OUT = 100, 900  # first seeds of the denoising runs

OURS: Mapping[str, tuple[str, FusionOptions]] = {
    "ours: subspaces": ("subspaces", FusionOptions()),
    "closed-form ρ 0.003": ("closed-form", FusionOptions(ridge=0.003)),
    "closed-form ρ 0.03": ("closed-form", FusionOptions(ridge=0.03)),
    "closed-form ρ 0.1": ("closed-form", FusionOptions(ridge=0.1)),
    "closed-form ρ 0.3": ("closed-form", FusionOptions(ridge=0.3)),
    "closed-form ρ 1": ("closed-form", FusionOptions(ridge=1.0)),
    "closed-form ρ 0.1, rank below n tokens": ("closed-form", FusionOptions(exact_from=1.0)),
    "closed-form-rank": ("closed-form-rank", FusionOptions()),
    "gradient, 50": ("gradient", FusionOptions()),
}


def job_of(images: Path, method: str, place: int) -> Job:
    """A LoRA, or Spectral A in columns of its own or in the same ones."""
    first = 4 * place if method == "spectral_a" else 0
    return Job(
        str(images),
        f"<{NAMES[place]}>",
        size=(PIXELS, PIXELS),
        method="lora" if method == "lora" else "spectral_a",
        rank=8,
        columns=() if method == "lora" else tuple(range(first, first + 4)),
        targets=TARGETS,
        init_words="shape",
    )


def pictures(folder: Path, name: str) -> Path:
    """A character's pictures in kohya layout; the third is the first one recoloured and upside down."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(PICTURES):
        picture, caption = draw_concept("bot" if name == "imp" else name, seed, token="<TOK>")
        if name == "imp":
            red, green, blue = picture.split()
            picture = Image.merge("RGB", (blue, red, green)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        picture.save(folder / f"{seed:02d}.png")
        (folder / f"{seed:02d}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def trained(pipe: Callable[[], Any], folder: Path, method: str, place: int, steps: int) -> Adapter:
    """One concept's adapter, from FOLDER or trained now."""
    name = NAMES[place]
    path = folder / f"{name}_{method}.safetensors"
    if not path.exists():
        job = job_of(pictures(folder / name, name), method, place)
        config = TrainConfig(
            steps=steps,
            batch_size=8,
            learning_rate=RATES[method],
            token_learning_rate=2e-2,
            schedule="cosine",
            preserve_every=0,
            seed=place,
        )
        train_adapter(pipe(), job, config, Output(folder, path.stem))
    return freeze(fileformat.load(path))


def seen(
    pipe: Callable[[], Any], folder: Path, method: str, adapters: Sequence[Adapter], place: int, seed: int
) -> Mapping[str, Statistics]:
    """Statistics of four short generations under one concept, from FOLDER or collected now."""
    path = folder / f"st_{method}_{place}_{seed}.safetensors"
    if not path.exists():
        prompts = [f"a <{NAMES[place]}> on a {background} background" for background in BACKGROUNDS]
        modules = modules_of(pipe().unet, adapters, "unet")
        with apply(pipe(), adapters[place]), collect(modules, adapters, dtype=torch.float64) as found:
            generate(
                pipe(),
                prompts,
                [seed + i for i in range(len(prompts))],
                steps=4,
                guidance=4.0,
                size=(PIXELS, PIXELS),
                batch_size=len(prompts),
            )
        statistics_file.save(found.statistics(), path)
    return statistics_file.load(path)


class Judge:
    """Objectives of fused layers on the held-out statistics."""

    def __init__(self, updates: Mapping[str, Tensor], held_out: Sequence[Mapping[str, Statistics]]) -> None:
        self.updates = updates
        self.moments = {name: [s[name].second_moment for s in held_out] for name in updates}

    def row(self, what: str, fused: Callable[[str], Tensor]) -> dict[str, Any]:
        """One table row; ``fused`` gives a layer's update (out, fan_in)."""
        shares, lost, had = [], torch.zeros(len(NAMES)), torch.zeros(len(NAMES))
        for name, updates in self.updates.items():
            update = fused(name)
            here = [
                [float(((d @ c) * d).sum()) for d in (own - update, own)]
                for own, c in zip(updates, self.moments[name], strict=True)
            ]
            gone, own_size = torch.tensor(here).unbind(1)
            shares.append(float(gone.sum() / own_size.sum()))
            lost, had = lost + gone, had + own_size
        kept = {f"retention {n}": float(v) for n, v in zip(NAMES, 1 - (lost / had).sqrt(), strict=True)}
        return {"fusion": what, "objective": fmean(shares), "total": float(lost.sum() / had.sum())} | kept


def data_free(adapters: Sequence[Adapter], judge: Judge) -> list[dict[str, Any]]:
    """The candidates, all but TIES and DARE in the small space of all rows and columns: they do not depend on
    orthonormal bases."""
    small: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, updates in judge.updates.items():
        factors = [a.layers[name].factors(a.strength_of(name)) for a in adapters]
        q, _ = torch.linalg.qr(torch.cat([f.scaled_up() for f in factors], 1).double())
        p, _ = torch.linalg.qr(torch.cat([f.down.flatten(1) for f in factors]).double().mT)
        small[name] = (q, p, q.mT @ updates @ p)
    rows = []
    for what, merge in CANDIDATES.items():
        entrywise = what.startswith(("ties", "dare"))

        def fused(name: str, merge: Any = merge, entrywise: bool = entrywise) -> Tensor:
            q, p, core = small[name]
            return merge(judge.updates[name]) if entrywise else q @ merge(core) @ p.mT

        rows.append(judge.row(what, fused))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", default="lora", choices=list(RATES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pipe = lru_cache(maxsize=1)(lambda: load_pipeline(MODEL))  # not needed when all is there
    places = range(len(NAMES))
    adapters = [trained(pipe, options.folder, options.method, i, options.steps) for i in places]
    fit, held_out = (
        [seen(pipe, options.folder, options.method, adapters, i, seed) for i in places]
        for seed in (FIT, HELD_OUT)
    )
    updates = {}
    for name in adapters[0].layers:
        found = [delta(a.layers[name].factors(a.strength_of(name))).flatten(1) for a in adapters]
        updates[name] = torch.stack(found).double()
    judge = Judge(updates, held_out)
    rows = data_free(adapters, judge)
    for what, (method, chosen) in OURS.items():
        layers = fuse(adapters, method, statistics=fit, options=chosen).adapter.layers
        rows.append(judge.row(what, lambda n, layers=layers: delta(layers[n].factors()).flatten(1).double()))
    rows.sort(key=lambda row: row["objective"])
    settings = {"method": options.method, "steps": options.steps, "threads": options.threads}
    return finish(f"merging_{options.method}", rows, [], settings)


if __name__ == "__main__":
    sys.exit(main())
