"""The concept and nothing else: how far an adapter moves the model under prompts without its concept, at the
same fidelity, with and without preservation; see docs/evidence.md.

    python -m benchmarks.quality.preservation [--seeds 0 1 2] [--methods lora foura] [--steps 120]

Everything is the embedded model and the command's own path: twelve pictures of a character with a new word,
all layers of the three block groups, batch 4. ``fidelity``: the relative decrease of the loss on twelve other
pictures of the character. ``drift``: Σ(F − F₀)²/ΣF₀² of the predictions with and without the adapter, over 12
drawings of scenes in combinations that nothing was trained on, under their own captions, at 4 noise levels.
``drawn``: the root mean square difference, in grey levels of 255, of pictures drawn with and without the
adapter under those captions from the same noise. At equal fidelity: where the run with the lower fidelity
ends, the other's drift is read between its looks (every 20 steps).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import finish
from benchmarks.quality.learning_rates import draw
from demo_model.draw import SHAPES, draw_scene, full_caption, random_scene
from spectral_core.demo.run import EMBEDDED_TARGETS, open_model
from spectral_core.pipelines import generate
from spectral_core.pipelines.conditioning import encode
from spectral_core.pipelines.dataset import encode_dataset, encode_pictures, find_dataset
from spectral_core.pipelines.job import Job
from spectral_core.pipelines.loading import diffusion_of, native_size
from spectral_core.pipelines.train import Output, train_adapter
from spectral_core.training.config.config import TrainConfig

CONCEPT, WORD, CLASS = "bot", "<bot>", "square"
SCENES, LEVELS, EVERY, DRAWN = 12, 4, 20, 6
OF_ITS_WORLD = tuple(
    f"a {colour} {shape} on a {background} background"
    for colour, shape, background in zip(
        ("red", "blue", "green", "pink", "white", "orange", "purple", "yellow") * 2,
        (*SHAPES, *SHAPES[4:], *SHAPES[:4]),
        ("blue", "gray", "black", "green", "red", "yellow", "white", "gray") * 2,
        strict=True,
    )
)
"""Sixteen everyday prompts in the words that the embedded model knows."""
CASES: dict[str, dict[str, Any]] = {
    "without": {"preserve_every": 0},
    "default": {"preserve_every": 4},
    "its world": {"preserve_every": 4, "preserve_prompts": " | ".join(OF_ITS_WORLD)},
    "its world, class": {
        "preserve_every": 4,
        "preserve_prompts": " | ".join(OF_ITS_WORLD),
        "class_words": CLASS,
    },
}


class Looks:
    """Fidelity and drift of whatever is on the pipeline."""

    def __init__(self, pipe: Any, concept: Path, word: str = WORD) -> None:
        self.pipe, self.noise = pipe, diffusion_of(pipe)
        self.size = native_size(pipe)
        data = find_dataset(pipe, Job(str(concept), word, init_words="", size=self.size))
        self.concept = torch.stack(encode_dataset(pipe, data, None)), [e.caption for e in data.examples]
        rng = np.random.default_rng(77)
        scenes = [random_scene(rng, evaluation=True, empty=0) for _ in range(SCENES)]
        pictures = torch.stack([_tensor(draw_scene(scene, rng)) for scene in scenes])
        self.scenes = encode_pictures(pipe, pictures).float(), [full_caption(scene) for scene in scenes]
        self.before = [self.predicted(*self.scenes, level)[0] for level in range(LEVELS)]
        self.drawn = self.pictures()

    @torch.no_grad()
    def predicted(self, latents: Tensor, captions: Sequence[str], level: int) -> tuple[Tensor, Tensor]:
        """(prediction, target) at a level, with noise of its own."""
        timestep = self.noise.levels(LEVELS)[level].repeat(len(latents))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(level))
        noisy = self.noise.add_noise(latents, noise, timestep)
        found = self.pipe.unet(noisy, timestep, **encode(self.pipe, list(captions), self.size)).sample
        return found, self.noise.target(latents, noise, timestep)

    def loss(self) -> float:
        pairs = [self.predicted(*self.concept, level) for level in range(LEVELS)]
        return fmean(float((found - target).square().mean()) for found, target in pairs)

    def drift(self) -> float:
        now = [self.predicted(*self.scenes, level)[0] for level in range(LEVELS)]
        moved = sum(float((a - b).square().sum()) for a, b in zip(now, self.before, strict=True))
        return moved / sum(float(b.square().sum()) for b in self.before)

    def pictures(self) -> Tensor:
        captions = self.scenes[1][:DRAWN]
        found = generate(self.pipe, captions, list(range(DRAWN)), steps=20, guidance=4.0, size=self.size)
        return torch.stack([torch.from_numpy(np.asarray(p, dtype=np.float32)) for p in found])

    def drawn_apart(self) -> float:
        return float((self.pictures() - self.drawn).square().mean().sqrt())


def _tensor(picture: Any) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def at_fidelity(curve: Sequence[tuple[float, float]], fidelity: float) -> float:
    """The drift of a run where its fidelity first comes to a value, between its looks."""
    for (low, first), (high, second) in pairwise(curve):
        if low <= fidelity <= high and high > low:
            return first + (second - first) * (fidelity - low) / (high - low)
    return curve[-1][1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--methods", nargs="+", default=["lora", "foura"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="preservation", help="of the result file")
    options = parser.parse_args(arguments)
    pipe = open_model(None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        seen, other = draw(root / "seen", 0), draw(root / "other", 500)
        looks = Looks(pipe, other)
        for method in options.methods:
            runs: dict[tuple[str, float, int], dict[str, Any]] = {}
            for seed in options.seeds:
                for case in options.cases:
                    for weight in options.weights if case != "without" else [1.0]:
                        found = measured(pipe, looks, seen, root, method, case, weight, options.steps, seed)
                        runs[case, weight, seed] = found
                        print(method, case, weight, seed, found, file=sys.stderr, flush=True)
            rows += compared(method, runs)
    return finish(options.name, rows, [])


def measured(
    pipe: Any,
    looks: Looks,
    seen: Path,
    root: Path,
    method: str,
    case: str,
    weight: float,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """One run: its curve of (fidelity, drift), the end, and what it draws."""
    told = {"preserve_weight": weight, **CASES[case]}
    of_config = {k: v for k, v in told.items() if k in TrainConfig.__dataclass_fields__}
    of_job = {k: v for k, v in told.items() if k not in of_config}
    job = Job(
        str(seen), WORD, init_words=CLASS, method=method, targets=EMBEDDED_TARGETS, size=looks.size, **of_job
    )
    if case != "its world, class":
        job = Job(
            str(seen), WORD, init_words="", method=method, targets=EMBEDDED_TARGETS, size=looks.size, **of_job
        )
    config = TrainConfig(steps=steps, batch_size=4, learning_rate=3e-3, seed=seed, target_open=0, **of_config)
    curve: list[tuple[float, float]] = []
    start = looks.loss()
    drawn = [0.0]
    seconds = [0.0]

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "step" and (event["step"] % EVERY == 0 or event["step"] == steps):
            curve.append((1 - looks.loss() / start, looks.drift()))
            if event["step"] == steps:
                drawn[0] = looks.drawn_apart()

    output = Output(
        root / f"{method}-{case}-{weight:g}-{seed}",
        "x",
        checkpoint_every=0,
        cache_folder=root / "cache",
        listener=look,
    )
    result = train_adapter(pipe, job, config, output).result
    seconds[0] = result.seconds
    return {"curve": [(0.0, 0.0), *curve], "drawn": drawn[0]}


def compared(method: str, runs: dict[tuple[str, float, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each case: its means over the seeds, and the drift at the fidelity that both reach."""
    rows = []
    for case, weight in dict.fromkeys((c, w) for c, w, _ in runs):
        mine = {s: r for (c, w, s), r in runs.items() if (c, w) == (case, weight)}
        ratios = []
        for seed, run in mine.items():
            plain = runs["without", 1.0, seed]["curve"]
            both = min(max(f for f, _ in run["curve"]), max(f for f, _ in plain))
            ratios.append(at_fidelity(run["curve"], both) / at_fidelity(plain, both))
        rows.append(
            {
                "method": method,
                "case": case,
                "weight": weight,
                "fidelity": _spread([r["curve"][-1][0] for r in mine.values()]),
                "drift": _spread([r["curve"][-1][1] for r in mine.values()]),
                "drawn": _spread([r["drawn"] for r in mine.values()]),
                "drift at equal fidelity, of that without": _spread(ratios),
            }
        )
    return rows


def _spread(values: Sequence[float]) -> str:
    mean = fmean(values)
    return f"{mean:.4g} ± {max(abs(v - mean) for v in values):.2g}"


if __name__ == "__main__":
    raise SystemExit(main())
