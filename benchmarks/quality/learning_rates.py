"""The methods' learning rates: a sweep on the embedded model, the loss on pictures that training never saw.

    python -m benchmarks.quality.learning_rates [--methods lora foura] [--steps 50] [--seeds 0 1 2]

Each cell trains the attention layers (rank 8, batch 4, no new word, constant rate after the warm-up) on
twelve drawn pictures of one character, and measures the loss on twelve others of it at fixed noise levels
with fixed noise, before and after. ``gain`` is the relative decrease, the mean over the seeds with the lowest
and the highest beside it; ``diverged`` counts the seeds that a rate broke off. The best rate of a method is
the one with the largest gain. Only the relation between the methods carries over to larger models.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.common import finish
from demo_model.draw import draw_concept
from spectral_core.adapter.adapter import Adapter
from spectral_core.demo.run import open_model
from spectral_core.errors import SpectralAdapterError
from spectral_core.pipelines import apply
from spectral_core.pipelines.dataset import Captions, encode_dataset, find_dataset
from spectral_core.pipelines.job import Job
from spectral_core.pipelines.loading import diffusion_of, native_size
from spectral_core.pipelines.train import Output, denoiser_of, train_adapter
from spectral_core.training.config.config import TrainConfig
from spectral_core.training.data.folder import Order
from spectral_core.training.engine.loop import Setup, evaluation_loss

CONCEPT = "bot"
PICTURES = 12
RATES = {
    "lora": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    "foura": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    "spectral_a": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    "spectral_r": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
}


def draw(folder: Path, first: int, concept: str = CONCEPT) -> Path:
    """Twelve pictures of a character, with captions."""
    folder.mkdir()
    for seed in range(first, first + PICTURES):
        picture, caption = draw_concept(concept, seed, token="<TOK>")
        picture.save(folder / f"{seed:03d}.png")
        (folder / f"{seed:03d}.txt").write_text(caption, encoding="utf-8")
    return folder


class HeldOut:
    """The loss of an adapter on other pictures of the concept."""

    def __init__(self, pipe: Any, folder: Path, job: Job) -> None:
        self.pipe = pipe
        data = find_dataset(pipe, Job(str(folder), job.token, init_words="", size=job.size))
        self.setup = Setup(
            denoiser=denoiser_of(pipe, data, Captions(pipe, keep=True, cache=None)),
            latents=torch.stack(encode_dataset(pipe, data, None)),
            order=Order(data.examples, 1, 0),
            diffusion=diffusion_of(pipe),
            attachments=[],
        )

    def loss(self, *adapters: Adapter) -> float:
        with apply(self.pipe, *adapters):
            return evaluation_loss(self.setup, levels=6)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--rates", type=float, nargs="+", help="instead of each method's own")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="learning_rates", help="of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pipe = open_model(None)
    size = native_size(pipe)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        seen, other = draw(root / "seen", 0), draw(root / "other", 500)
        for method in options.methods:
            job = Job(str(seen), f"<{CONCEPT}>", init_words="", method=method, size=size)
            held_out = HeldOut(pipe, other, job)
            before = held_out.loss()
            for rate in options.rates or RATES[method]:
                gains = []
                for seed in options.seeds:
                    config = TrainConfig(steps=options.steps, batch_size=4, learning_rate=rate, seed=seed)
                    output = Output(
                        root / f"{method}-{rate:g}-{seed}",
                        "x",
                        checkpoint_every=0,
                        cache_folder=root / "cache",
                    )
                    try:
                        trained = train_adapter(pipe, job, config, output).adapter
                        gains.append(1 - held_out.loss(trained) / before)
                    except SpectralAdapterError as error:  # a rate that diverges is a result
                        print(f"{method} at {rate:g}: {error}", file=sys.stderr)
                row = {"method": method, "rate": rate, "before": before, "gain": None}
                if gains:
                    row |= {"gain": fmean(gains), "gain_low": min(gains), "gain_high": max(gains)}
                rows.append(row | {"diverged": len(options.seeds) - len(gains)})
                print(rows[-1], file=sys.stderr, flush=True)
    return finish(options.name, rows, [], vars(options))


if __name__ == "__main__":
    sys.exit(main())
